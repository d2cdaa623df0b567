"""What a run is called, how far it is, and how results are handed to emit.lua; keys: keys.py."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from queue_api.connection.settings import DEFAULT_RUN_TTL_S
from queue_api.wire.errors import InvalidRequestError
from queue_api.wire.schemas import GenerationResult

__all__ = [
    "RunStatus",
    "check_run_id",
    "emit_args",
    "is_run_id",
    "result_args",
    "run_of_call",
]

UNKNOWN_TOTAL = -1
# narrower than a Redis key has to be: RQ refuses job ids with other characters
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def is_run_id(run: str) -> bool:
    """True if `run` may name a run (and so be part of a Redis key)."""
    return _RUN_ID.fullmatch(run) is not None


def check_run_id(run: str) -> str:
    """Return `run` if it may name a run.

    :raises InvalidRequestError: empty, longer than 128, or with other characters than
        letters, digits, `_` and `-`
    """
    if not is_run_id(run):
        raise InvalidRequestError(
            f"run id {run!r:.200}: use 1 to 128 letters, digits, '_' or '-', starting with a "
            "letter or digit"
        )
    return run


def run_of_call(queue: str, request_id: str) -> str:
    """The run of one that an id of the caller's stands for.

    No run that somebody names himself is called so, nor the same id's on another queue.
    """
    named = f"{len(queue)} {queue} {request_id}".encode(errors="surrogatepass")
    return "call-" + hashlib.blake2b(named, digest_size=16).hexdigest()


def emit_args(
    results: Iterable[GenerationResult], ttl_s: int = DEFAULT_RUN_TTL_S
) -> list[str | int]:
    """The ARGV of emit.lua for these results of one run."""
    args: list[str | int] = [ttl_s]
    for result in results:
        args += result_args(result)
    return args


def result_args(result: GenerationResult) -> tuple[str | int, ...]:
    """What emit.lua takes of one result.

    :raises ValueError: it can't be written as JSON
    """
    return (
        result.index,
        result.finish_reason.value,
        result.prompt_tokens,
        result.completion_tokens,
        # not exclude_defaults: comparing every field takes twice as long
        result.model_dump_json(exclude_unset=True),
    )


@dataclass(frozen=True)
class RunStatus:
    """How far a run is. Counts are of requests."""

    id: str
    queue: str
    total: int | None
    """None while the producer hasn't said how many there will be."""
    done: int = 0
    finish_reasons: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    suppressed: int = 0
    """Results that came though their requests had one: of work that was done twice."""
    submitted: int = 0
    """How many of the requests have been put on the queue or ended at once."""
    chunk_size: int = 1
    """Request i is in the run's chunk i // chunk_size."""
    cancelled: bool = False
    created_at: float = 0.0
    """Epoch seconds."""
    fingerprint: str = ""
    """Tells the requests it began with from others under the same name."""
    jobs: Mapping[str, int] = field(default_factory=dict)
    """Unfinished jobs by RQ's word for their state; only Run.status looks for them."""

    @property
    def complete(self) -> bool:
        return self.total is not None and self.done >= self.total

    @classmethod
    def from_hash(cls, run: str, raw: Mapping[bytes, bytes]) -> RunStatus:
        """Read the run's hash as redis-py returns it."""
        fields = {key.decode(): value.decode() for key, value in raw.items()}
        total = int(fields.get("total", UNKNOWN_TOTAL))
        return cls(
            id=run,
            queue=fields.get("queue", ""),
            total=None if total == UNKNOWN_TOTAL else total,
            done=int(fields.get("done", 0)),
            finish_reasons={
                key.removeprefix("finish:"): int(value)
                for key, value in fields.items()
                if key.startswith("finish:")
            },
            prompt_tokens=int(fields.get("prompt_tokens", 0)),
            completion_tokens=int(fields.get("completion_tokens", 0)),
            suppressed=int(fields.get("suppressed", 0)),
            submitted=int(fields.get("submitted", 0)),
            chunk_size=int(fields.get("chunk_size", 1)),
            cancelled=fields.get("cancelled") == "1",
            created_at=float(fields.get("created_at", 0)),
            fingerprint=fields.get("fingerprint", ""),
        )
