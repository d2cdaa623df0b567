"""A file of prompts to a file of answers: resumable, each row once, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from queue_api.client.client import Client
from queue_api.datasets.columns import RowParser
from queue_api.datasets.feed import DatasetRun, OpenedRun
from queue_api.datasets.formats.jsonl import RowWriter
from queue_api.datasets.summary import Progress, RunSummary
from queue_api.store.runs import check_run_id
from queue_api.wire.errors import DatasetError, InvalidRequestError
from queue_api.wire.schemas import SamplingParams

__all__ = ["DEFAULT_WINDOW", "dataset_run_id", "run_dataset"]

DEFAULT_WINDOW = 8192


async def run_dataset(
    client: Client,
    input: Path | str,  # noqa: A002 - as on the command line
    output: Path | str,
    *,
    defaults: SamplingParams | None = None,
    run: str | None = None,
    queue: str | None = None,
    chunk_size: int | None = None,
    window: int = DEFAULT_WINDOW,
    on_progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> RunSummary:
    """Generate for each row of a JSON Lines file and append it, answered, to another.

    Doing it again with the same input, output and defaults after any crash goes on where it
    stopped. At most `window` requests are in Redis at a time. A row that is wrong becomes a row
    with an `error`. `-` is stdin or stdout. The columns are in docs/datasets.md.

    :raises DatasetError: a file can't be used, or the output belongs to another input
    :raises InvalidRequestError: the run id belongs to another input or other defaults
    """
    if input != "-" and output != "-" and _same_file(input, output):
        raise DatasetError(f"{input} can't be both input and output")
    writer = RowWriter(output)
    try:
        parser = RowParser(defaults) if warn is None else RowParser(defaults, warn=warn)
        mark = _fingerprint(input, output, defaults)
        run_id = check_run_id(run) if run is not None else dataset_run_id(input, output, defaults)
        opened = await _open(client, run_id, queue, chunk_size, mark)
        work = DatasetRun(
            client, opened, writer, source=input, parser=parser, window=window, listener=on_progress
        )
        return await work.run()
    finally:
        writer.close()


def dataset_run_id(
    input: Path | str,  # noqa: A002
    output: Path | str,
    defaults: SamplingParams | None = None,
) -> str:
    """The run of these files and defaults: the same until the input changes."""
    if input == "-":
        return f"stdin-{uuid4().hex[:12]}"
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(input).stem).strip("-_")[:40] or "rows"
    return f"{name}-{_fingerprint(input, output, defaults)[:12]}"


def _fingerprint(
    input: Path | str,  # noqa: A002
    output: Path | str,
    defaults: SamplingParams | None,
) -> str:
    """Of the files and defaults. The input's size and time stand for its content."""
    parts = [str(output if output == "-" else Path(output).resolve())]
    parts.append((defaults or SamplingParams()).model_dump_json())
    try:
        if input != "-":
            info = os.stat(input)  # noqa: PTH116 - one call for both, of a str or a Path
            parts += [str(Path(input).resolve()), str(info.st_size), str(info.st_mtime_ns)]
    except OSError as error:
        raise DatasetError(f"can't read {input}: {error.strerror or error}") from None
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _same_file(one: Path | str, other: Path | str) -> bool:
    try:
        return os.path.samefile(one, other)  # noqa: PTH121
    except OSError:
        return False


async def _open(
    client: Client, run: str, queue: str | None, chunk_size: int | None, mark: str
) -> OpenedRun:
    store = client.store
    there = await store.open(
        run,
        queue=queue or client.settings.queue,
        chunk_size=chunk_size or client.settings.chunk_size,
        fingerprint=mark,
    )
    if there.get("fingerprint") != mark:
        raise InvalidRequestError(
            f"run {run!r} belongs to another input, output or other defaults; choose another id"
        )
    # who runs it again wants the rest
    await store.set(run, cancelled=0)
    # before the stream: what is done later comes through the subscription
    done = await store.done(run)
    waiting: dict[int, bytes] = {}
    last = "0"
    while entries := await store.entries(run, last):
        waiting.update((index, raw) for _, index, raw in entries)
        last = entries[-1][0]
    return OpenedRun(
        run=run,
        queue=there["queue"],
        chunk_size=int(there["chunk_size"]),
        submitted=int(there.get("submitted", 0)),
        done=done,
        waiting=waiting,
        last=last,
    )
