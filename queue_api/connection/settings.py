"""Settings, the producers' and those all share: with workers/settings.py, the only places that
read the environment."""

from __future__ import annotations

import os
from typing import Any, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from queue_api.wire.errors import ConfigurationError

__all__ = [
    "DEFAULT_QUEUE",
    "DEFAULT_REDIS_URL",
    "DEFAULT_RUN_TTL_S",
    "EnvironmentSettings",
    "LogLevel",
    "QueueSettings",
]

DEFAULT_QUEUE = "batchmill"
DEFAULT_REDIS_URL = "redis://localhost:6379/0"
SHARED_VARIABLE = "REDIS_URL"
"""Where other programs look for the address, too."""
DEFAULT_RUN_TTL_S = 7 * 86_400

LogLevel = Literal["debug", "info", "warning", "error"]


class EnvironmentSettings(BaseSettings):
    """Each field is read from `BATCHMILL_<FIELD>`; Redis's address from `REDIS_URL` after that."""

    model_config = SettingsConfigDict(env_prefix="BATCHMILL_", frozen=True, extra="forbid")

    redis_url: str = Field(
        # no alias: those are looked for among what is given and in the environment at once
        default_factory=lambda: os.environ.get(SHARED_VARIABLE, DEFAULT_REDIS_URL)
    )
    redis_server: str | None = None
    """The server program that is started where no address is named: a path or a name on PATH, or
    `bundled` for the one that a Python package brought."""
    log_level: LogLevel = "warning"
    run_ttl_s: int = Field(default=DEFAULT_RUN_TTL_S, ge=60)
    """A run, and a failed job, are forgotten so long after their last change."""

    @property
    def names_redis(self) -> bool:
        """Whether somebody said where Redis is."""
        return "redis_url" in self.model_fields_set or SHARED_VARIABLE in os.environ

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the environment; what is given and isn't None goes before it.

        :raises ConfigurationError: naming the setting, its value and the limit
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            flag_or_variable = f"BATCHMILL_{name.upper()}" if name.islower() else name
            raise ConfigurationError(
                f"{flag_or_variable} is {first['input']!r:.80}: {first['msg'].lower()}"
            ) from None


class QueueSettings(EnvironmentSettings):
    """Where Redis is and how requests are put on its queue."""

    queue: str = Field(default=DEFAULT_QUEUE, min_length=1, max_length=128)
    chunk_size: int = Field(default=32, ge=1, le=1024)
    """Requests to an RQ job."""
    max_queue: int = Field(default=0, ge=0)
    """Jobs that the queue may hold before producers have to wait; 0: no limit."""
    max_connections: int = Field(default=16, ge=2)
    """Of one client; one of them is the reader's."""
    retries: int = Field(default=3, ge=0, le=100)
    """How often a job that failed is tried again."""
    job_ttl_s: int = Field(default=60, ge=1)
    """How long a finished job stays visible to RQ's tools; its results stay with the run."""
    reconcile_s: float = Field(default=5.0, gt=0)
    """After so much silence a client looks for jobs that ended without results."""
    reconnect_s: float = Field(default=300.0, ge=0)
    """How long a call goes on trying when the connection is lost."""
    producer_patience_s: float = Field(default=600.0, gt=0)
    """How long a reader waits for a producer that has fallen silent before it says how much
    there will be."""
