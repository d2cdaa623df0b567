"""How a chunk of requests is an RQ job, and what of a job read back is inert.

A job is an ordinary RQ job, JSON-serialized, on an ordinary RQ queue. Its function is the label
`batchmill.generate`: checked, never imported. Two forms are served:

* ours: keyword arguments `run` and `requests`, a list of `[index, request]`
* anyone's: `queue.enqueue("batchmill.generate", prompt="…", max_tokens=8)` from stock RQ with the
  JSON serializer: one request, whose result is the job's return value
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from rq import Queue
from rq.job import Job

from queue_api.store.runs import is_run_id
from queue_api.wire.errors import BatchmillError, InvalidRequestError, RequestTooLargeError
from queue_api.wire.sampling import SAMPLING_FIELDS
from queue_api.wire.schemas import HALF_PAIR, MOST_FIELDS, GenerationRequest

__all__ = [
    "GENERATE",
    "MAX_PAYLOAD_BYTES",
    "MAX_REQUEST_BYTES",
    "Chunk",
    "GenerateJob",
    "GenerateQueue",
    "JobPayloadError",
    "chunk_job_id",
    "chunk_payload",
    "decode_chunk",
    "fit_together",
    "parse_item",
    "parse_items",
    "request_from_fields",
    "request_json",
    "single_job_id",
    "too_large",
]

GENERATE = "batchmill.generate"
BATCH_SIZE_FIELD = "batch_size"
"""Extra field of a job's hash: how many requests it holds, so that CLAIM can count them."""
MAX_RETRIES_FIELD = "max_retries"
"""Extra field: how many retries it began with; less `retries_left` it tells the attempt."""
MAX_PAYLOAD_BYTES = 64 * 2**20
"""A job's data may not unpack to more than this; a zip bomb ends as a failed job."""
MAX_REQUEST_BYTES = MAX_PAYLOAD_BYTES - 4096
"""A request's JSON may not take more: nobody could read the job that holds it."""
MAX_MARKS = ((b"[{", 2**20), (b",", 6 * 2**20), (b'"', 4 * 2**20))
"""How often these may stand in a job's JSON, in its texts or between its values: some 60 KiB can
unpack to so many values that nothing else is done for seconds while they are read."""
MAX_REQUESTS_PER_JOB = 1024
RUN_FINGERPRINT_FIELD = "run_fingerprint"
"""Extra field: that of the run it was made for; another run may have its name by now."""
LANE_FIELD = "lane"
"""Extra field: jobs of one lane are for one worker, as far as that keeps all of them busy."""
_REQUESTS = TypeAdapter(list[GenerationRequest])


def chunk_job_id(run: str, chunk: int) -> str:
    """The RQ job that holds a run's requests chunk * chunk_size and following."""
    return f"{run}-{chunk}"


def single_job_id(run: str, index: int) -> str:
    """The RQ job that holds one request split off from its chunk, for a retry on its own."""
    return f"{run}-i{index}"


class JobPayloadError(BatchmillError):
    """The job as a whole can't be read, or names a function that isn't served here."""


class GenerateJob(Job):
    """An RQ job whose function, callbacks and webhooks are data only.

    RQ's JSON serializer doesn't stop code from running: names of functions and callbacks, and
    addresses of webhooks, come from Redis. Here they are never imported nor called.
    """

    success_callback = property(lambda _: None)
    failure_callback = property(lambda _: None)
    stopped_callback = property(lambda _: None)

    @property
    def func(self) -> Callable[..., Any]:
        """:raises JobPayloadError: always; a worker of ours imports nothing that Redis names"""
        raise JobPayloadError(f"{self.func_name!r} is a label; batchmill imports no function")

    def send_webhooks(self, *_: Any, **__: Any) -> None:
        """Addresses named in a job aren't called."""


class GenerateQueue(Queue):
    """An RQ queue whose jobs are inert (see GenerateJob)."""

    job_class = GenerateJob

    def acquire_maintenance_lock(self) -> bool:
        """Like RQ's, held for 30 s instead of 899: a killed holder mustn't block reclaiming."""
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=30))


@dataclass(frozen=True)
class Chunk:
    """What a job holds, its requests still unchecked: each is checked on its own."""

    run: str | None
    items: list[tuple[int, object]]
    """(index in the run, request as JSON value)"""


def chunk_payload(run: str, items: Iterable[tuple[int, bytes]]) -> bytes:
    """What the RQ job that holds these requests unpacks to, as JSON.

    :param items: (index in the run, request as JSON)
    """
    requests = b",".join([b"[%d,%b]" % item for item in items])
    start = f'["{GENERATE}",null,[],{{"run":{json.dumps(run)},"requests":['
    return start.encode() + requests + b"]}]"


def too_large(as_json: bytes) -> RequestTooLargeError | None:
    """What is wrong with a request of this JSON, if no job could hold it."""
    if len(as_json) > MAX_REQUEST_BYTES:
        return RequestTooLargeError(
            f"the request takes {len(as_json)} bytes as JSON; the limit is {MAX_REQUEST_BYTES}"
        )
    if (excess := too_many_marks([as_json])) is not None:
        return RequestTooLargeError(f"the request has {excess}, as JSON")
    return None


def fit_together(parts: Sequence[bytes]) -> bool:
    """Whether requests of this JSON may be in one job."""
    return sum(map(len, parts)) <= MAX_REQUEST_BYTES and too_many_marks(parts) is None


def too_many_marks(parts: Sequence[bytes]) -> str | None:
    """What there is too much of in a job of this JSON, in words."""
    size = sum(map(len, parts))
    for marks, most in MAX_MARKS:
        if size > most:  # else there can't be so many
            found = sum(
                part.count(mark) for part in parts for mark in (marks[:1], marks[1:]) if mark
            )
            if found > most:
                shown = " or ".join(repr(chr(mark)) for mark in marks)
                return f"{found} of {shown}; the limit is {most}"
    return None


def request_json(request: GenerationRequest) -> bytes:
    """A request as it stands in a job and in fingerprints.

    Whoever takes a request in calls this at once: what can't travel is that request's fault alone,
    and mustn't show when it is already among others.

    :raises InvalidRequestError: it can't be written as JSON; half a surrogate pair, say
    """
    try:
        # model_dump_json is this, decoded; what was given counts, even if it is our default
        return GenerationRequest.__pydantic_serializer__.to_json(request, exclude_unset=True)
    except (ValueError, RecursionError) as error:
        raise _unwritable(request, error) from None


def _unwritable(request: GenerationRequest, error: Exception) -> InvalidRequestError:
    """Which field of the request can't be written as JSON, and why."""
    reason = str(error).removeprefix("Error serializing to JSON: ")[:80]
    field = "the request"
    for name in GenerationRequest.model_fields:
        try:
            to_json(getattr(request, name, None))
        except (ValueError, RecursionError):
            field = f"'{name}'"
            break
    if "utf-8" in reason or "surrogates" in reason:
        reason = HALF_PAIR
    return InvalidRequestError(f"{field} can't be written as JSON: {reason}")


def decode_chunk(job_id: str, data: bytes) -> Chunk:
    """Read a job's `data` field as it stands in Redis.

    :raises JobPayloadError: not zlib or JSON, too large, another function, or not our shape
    """
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data, MAX_PAYLOAD_BYTES)
        if unpacker.unconsumed_tail:
            raise JobPayloadError(f"job data unpacks to more than {MAX_PAYLOAD_BYTES} bytes")
        if (excess := too_many_marks([raw])) is not None:
            raise JobPayloadError(f"job data has {excess}")
        name, _, args, kwargs = json.loads(raw)
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        raise JobPayloadError(
            f"job data isn't JSON ({type(error).__name__}); enqueue with RQ's JSON serializer: "
            "Queue(…, serializer='json')"
        ) from None
    if name != GENERATE:
        raise JobPayloadError(f"function {name!r} isn't served here; enqueue {GENERATE!r}")
    if not isinstance(kwargs, dict) or not isinstance(args, list):
        raise JobPayloadError("job arguments aren't a list and an object")
    if "requests" not in kwargs:
        return Chunk(None, [(0, _stock_request(job_id, args, kwargs))])
    return Chunk(*_our_form(kwargs))


def _stock_request(job_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    if len(args) > 1:
        raise JobPayloadError(f"{GENERATE} takes one positional argument (prompt), not {len(args)}")
    fields = {"id": job_id, **kwargs}
    if args:
        fields["prompt"] = args[0]
    return _nest_sampling(fields)


def _our_form(kwargs: Mapping[str, object]) -> tuple[str | None, list[tuple[int, object]]]:
    run, requests = kwargs.get("run"), kwargs["requests"]
    if run is not None and not (isinstance(run, str) and is_run_id(run)):
        raise JobPayloadError(f"'run' is {run!r:.80}, not a run id")
    if not isinstance(requests, list) or not 0 < len(requests) <= MAX_REQUESTS_PER_JOB:
        raise JobPayloadError(f"'requests' isn't a list of 1 to {MAX_REQUESTS_PER_JOB}")
    for item in requests:
        if not (isinstance(item, list) and len(item) == 2 and type(item[0]) is int):
            raise JobPayloadError("an item of 'requests' isn't [index, request]")
        if not 0 <= item[0] < 2**31:
            raise JobPayloadError(f"index {item[0]} isn't within 0 and 2^31")
    return run, [(index, request) for index, request in requests]


def parse_item(item: object) -> GenerationRequest:
    """Check one request of a chunk.

    :raises InvalidRequestError: for this request alone
    """
    return GenerationRequest.parse(item)


def parse_items(items: Sequence[object]) -> list[GenerationRequest | InvalidRequestError]:
    """Check the requests of a chunk: all at once, and if one is wrong, each on its own."""
    if not any(isinstance(item, dict) and len(item) > MOST_FIELDS for item in items):
        try:
            return [*_REQUESTS.validate_python(items)]
        except ValidationError:
            pass
    return [_request_or_error(item) for item in items]


def _request_or_error(item: object) -> GenerationRequest | InvalidRequestError:
    try:
        return parse_item(item)
    except InvalidRequestError as error:
        return error


def _nest_sampling(fields: Mapping[str, object]) -> dict[str, object]:
    """Flat fields, as users write them, to the wire form with `sampling` apart."""
    flat: dict[str, object] = {}
    sampling: dict[str, object] = {}
    for name, value in fields.items():
        (sampling if name in SAMPLING_FIELDS else flat)[name] = value
    if sampling:
        if "sampling" in flat:
            raise InvalidRequestError("give sampling fields flat or in 'sampling', not both")
        flat["sampling"] = sampling
    return flat


def request_from_fields(fields: Mapping[str, object]) -> GenerationRequest:
    """Check a request given with flat sampling fields: `{"id":…, "prompt":…, "max_tokens":8}`.

    :raises InvalidRequestError: unknown field, wrong type, out of range
    """
    return GenerationRequest.parse(_nest_sampling(fields))
