"""What a worker can be told, by flag or environment; the flag wins."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from engine.config import PartitionStrategy, Quantization
from queue_api.connection.connect import SOCKET_TIMEOUT_S
from queue_api.connection.settings import DEFAULT_QUEUE, EnvironmentSettings, LogLevel
from queue_api.wire.sampling import GenerationDefaults

__all__ = ["DEMO_MODEL", "WorkerSettings"]

DEMO_MODEL = "demo"
SHORTEST_TIMEOUT_S = 1.0
"""Less may be a mere hiccup of a busy server or its disk."""


def _split(value: object) -> object:
    """Let `a,b` stand for a list, as environment variables have it."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class WorkerSettings(EnvironmentSettings):
    """Environment variables are the names in upper case after `BATCHMILL_`."""

    queues: Annotated[list[str], NoDecode] = Field(default=[DEFAULT_QUEUE], min_length=1)
    """Names of RQ queues, the one to serve first in front."""
    name: str | None = None
    """The worker's name in RQ; unique among live workers. Host and pid when unset."""

    log_level: LogLevel = "info"

    model: str = Field(default=DEMO_MODEL, min_length=1)
    """A local folder, a Hub id, or `demo`: the toy that comes with batchmill."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    stages: Annotated[list[str], NoDecode] = Field(default=["cpu"], min_length=1)
    """One device per stage, in order, such as cuda:0,cuda:1."""
    partition: PartitionStrategy = "uniform"
    """How layers are shared out among the stages; `custom` needs `layer_bounds`."""
    layer_bounds: Annotated[list[int] | None, NoDecode] = None
    """The first layer of every stage but the first, such as 3,6 for three stages."""
    dtype: str = "auto"
    quantization: Quantization = "none"
    """`int8` quantizes the layers' weights; on a CPU in float32 only."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Requests that generate at the same time."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Tokens in one forward."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Prompt and new tokens together; the model's own limit when unset."""
    prefix_caching: bool = True
    """Compute a prefix that sequences share once."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the engine."""
    generation_defaults: GenerationDefaults = "model"
    """What of the model's generation config counts where a request says nothing: `model` is what
    `generate(do_sample=False)` applies, `all` its sampling fields too, `none` nothing."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    capacity: int | None = Field(default=None, ge=1)
    """Requests to hold, generating or next in line; twice max_num_seqs when unset."""
    lease_s: float = Field(default=30.0, ge=1.0)
    """A dead worker's jobs are taken over between one and two of these after its death."""
    drain_grace_s: float = Field(default=20.0, ge=0.0)
    """On SIGTERM, how long running requests may go on before they are given back."""
    max_deaths: int = Field(default=3, ge=1)
    """So many workers may die holding a request, the last time holding nothing else, before it
    goes to the dead letter."""
    checkpoint_tokens: int = Field(default=256, ge=1)
    """A worker's death costs a long generation at most so many tokens."""

    split_queues = field_validator("queues", "stages", "layer_bounds", mode="before")(_split)

    @property
    def redis_timeout_s(self) -> float:
        """How long Redis may go without an answer: a lease is to outlast that, and a new try."""
        return min(SOCKET_TIMEOUT_S, max(SHORTEST_TIMEOUT_S, self.lease_s / 4))

    @property
    def requests_held(self) -> int:
        """The capacity in force."""
        return self.capacity or 2 * self.max_num_seqs
