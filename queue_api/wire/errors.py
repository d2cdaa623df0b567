"""Every error that batchmill raises on purpose.

* BatchmillError
  * ConfigurationError: a setting, flag or environment variable can't be used
    * MissingExtraError: an optional dependency (torch, ...) isn't installed
    * ModelNotFoundError: no such model folder or Hub id
    * UnsupportedModelError: the architecture can't run here without being wrong
    * PartitionError: a partition that doesn't fit its model or devices
  * RequestError: one request is at fault; it becomes that request's result
    * InvalidRequestError
    * UnsupportedRequestError
    * PromptTooLongError
    * MaxTokensTooLargeError
    * DuplicateRequestError
    * RequestTooLargeError
    * JobKeyTakenError
    * RequestOutOfMemoryError
  * RedisAccessError: the Redis server can't be used
    * RedisUnavailableError
    * RedisAuthError
    * RedisServerError: it answers, but is too old or set up so that work may be lost
  * QueueFullError: the queue's limit is reached; try again later
  * RunNotFoundError
  * RunIncompleteError: a run ended with requests that have no result
  * GenerationFailedError: a result holds an error instead of text, and was asked to raise it
  * ClientClosedError: the client is closed, or was while the call waited
  * WrongOwnerError: a client used from another process or event loop than its own
  * DatasetError: an input or output file as a whole can't be used
  * RowsFailedError: more rows of a run have errors than are put up with
  * EngineError: the engine can't go on; its worker must end
"""

from __future__ import annotations

__all__ = [
    "BatchmillError",
    "ClientClosedError",
    "ConfigurationError",
    "DatasetError",
    "DuplicateRequestError",
    "EngineError",
    "GenerationFailedError",
    "InvalidRequestError",
    "JobKeyTakenError",
    "MaxTokensTooLargeError",
    "MissingExtraError",
    "ModelNotFoundError",
    "PartitionError",
    "PromptTooLongError",
    "QueueFullError",
    "RedisAccessError",
    "RedisAuthError",
    "RedisServerError",
    "RedisUnavailableError",
    "RequestError",
    "RequestOutOfMemoryError",
    "RequestTooLargeError",
    "RowsFailedError",
    "RunIncompleteError",
    "RunNotFoundError",
    "UnsupportedModelError",
    "UnsupportedRequestError",
    "WrongOwnerError",
]


class BatchmillError(Exception):
    """Root of the tree; its text says what was wrong, with which value, and what to do."""


class ConfigurationError(BatchmillError):
    """A setting, flag or environment variable can't be used."""


class MissingExtraError(ConfigurationError):
    """An optional dependency isn't installed; the text names the extra that brings it."""


class ModelNotFoundError(ConfigurationError):
    """Neither a local folder nor a Hub id that can be reached."""


class UnsupportedModelError(ConfigurationError):
    """The architecture, or a feature of it, can't run here without a risk of wrong text."""


class PartitionError(ConfigurationError):
    """A partition that doesn't fit its model or devices."""


class RequestError(BatchmillError):
    """One request is at fault. It becomes that request's result and touches no other."""

    code = "invalid_request"


class InvalidRequestError(RequestError):
    """A field is missing, unknown, of the wrong type or out of range."""


class UnsupportedRequestError(RequestError):
    """This worker lacks what the request asks for."""

    code = "unsupported_request"


class PromptTooLongError(RequestError):
    """The prompt leaves no room for a new token in the model's length or the KV cache."""

    code = "prompt_too_long"


class MaxTokensTooLargeError(RequestError):
    """The prompt fits, but prompt plus max_tokens doesn't."""

    code = "max_tokens_too_large"


class DuplicateRequestError(RequestError):
    """Another request of the same run has this id."""

    code = "duplicate_id"


class RequestTooLargeError(RequestError):
    """The prompt or metadata exceeds the size that one request may have."""

    code = "request_too_large"


class JobKeyTakenError(RequestError):
    """Where the request's job would be in Redis stands somebody's key of another type."""

    code = "job_key_taken"


class RequestOutOfMemoryError(RequestError):
    """The worker's memory doesn't hold the request, even with no other beside it."""

    code = "out_of_memory"


class RedisAccessError(BatchmillError):
    """The Redis server can't be used."""

    may_pass = False
    """The same may work later, without anybody's doing."""


class RedisUnavailableError(RedisAccessError):
    """Nothing answers at the address."""


class RedisAuthError(RedisAccessError):
    """The server refused the user or password, or the user may not run a command we need."""


class RedisServerError(RedisAccessError):
    """The server answers but is too old, or set up so that work may be lost."""


class QueueFullError(BatchmillError):
    """The queue holds as many jobs as its limit allows; try again later."""


class RunNotFoundError(BatchmillError):
    """No run of that id: never submitted here, or past its time to live."""


class RunIncompleteError(BatchmillError):
    """The run ended, or the wait for it did, with requests that have no result."""


class GenerationFailedError(BatchmillError):
    """A result holds an error, or was cancelled, and GenerationResult.raise_for_error was asked."""


class ClientClosedError(BatchmillError, RuntimeError):
    """The client is closed, or was while the call waited."""


class WrongOwnerError(BatchmillError, RuntimeError):
    """A client is used from another process, or another event loop, than the one that has it."""


class DatasetError(BatchmillError):
    """An input or output file as a whole can't be used."""


class RowsFailedError(BatchmillError):
    """All rows of a run have errors, or more than the caller puts up with."""


class EngineError(BatchmillError):
    """The engine can't go on (device error, failed stage); its worker must end."""
