"""What a worker remembers of the jobs and requests that it holds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from queue_api.wire.schemas import ErrorDetail, GenerationRequest, GenerationResult
from workers.leases import Lease
from workers.running.checkpoints import Place
from workers.running.outcomes import request_id

__all__ = ["ActiveJob", "ActiveRequest", "Because"]


class Because(Enum):
    """Why requests leave their chunk."""

    SUSPECT = "a worker died holding them: they run again on their own"
    FAILED = "they failed: a retry is spent, after its interval"
    DEAD = "they failed and no retry is left: to the dead letter"


@dataclass(eq=False, slots=True)
class ActiveRequest:
    """One request of a claimed job."""

    job: ActiveJob
    index: int
    item: object
    """As it stood in the job."""
    request: GenerationRequest | None = None
    """None if it can't be read."""
    timer: asyncio.TimerHandle | None = None
    """Ends it when its time is over."""
    key: str = field(init=False)
    """Its name in the engine."""
    place: Place = field(init=False)
    """Where its partial text is kept."""

    def __post_init__(self) -> None:
        lease = self.job.lease
        self.key = f"{lease.execution_id}:{self.index}"
        self.place = Place(self.job.run or lease.job_id, self.index)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def as_json(self) -> object:
        """The request as it stands in a job."""
        if self.request is None:
            return self.item
        return self.request.model_dump(mode="json", exclude_unset=True)

    @property
    def id(self) -> str:
        if self.request is not None:
            return self.request.id
        return request_id(self.item, f"{self.job.lease.job_id}-{self.index}")


@dataclass(eq=False, slots=True)
class ActiveJob:
    """One claimed job; it ends when `left` is empty."""

    lease: Lease
    enqueued_at: float
    """Epoch seconds."""
    about: Mapping[str, object]
    """What its results have in common; see Outcome."""
    run: str | None = None
    left: dict[int, ActiveRequest] = field(default_factory=dict)
    """By index, what has no result yet."""
    answered: set[int] = field(default_factory=set)
    """By index, what has a result."""
    size: int = 0
    results: list[GenerationResult] = field(default_factory=list)
    """Of a job without a run: they become its return value."""
    failed: dict[int, tuple[ActiveRequest, ErrorDetail]] = field(default_factory=dict)
    """By index, what the engine failed at through no fault that the request shows, and why."""
    is_ending: bool = False
    """Its end is on its way to Redis."""
    timer: asyncio.TimerHandle | None = None
    """Ends it when its time, as RQ counts it, is over."""

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    @property
    def age_s(self) -> float:
        """How long it had been on the queue when it was claimed, by two hosts' clocks."""
        return self.lease.claimed_at - self.enqueued_at

    def return_value(self) -> bytes:
        """What RQ shows as its return value, as JSON: the result itself where there is no run."""
        if self.run is not None:
            return json.dumps({"run": self.run, "requests": self.size}).encode()
        values = [result.model_dump(mode="json") for result in self.results]
        return json.dumps(values[0] if len(values) == 1 else values).encode()

    def take_left(self) -> dict[int, tuple[object, str]]:
        """What a split needs of the requests without a result: the request and no reason."""
        return {index: (active.as_json(), "") for index, active in self.left.items()}

    def take_failed(self) -> dict[int, tuple[object, str]]:
        return {i: (active.as_json(), why.message) for i, (active, why) in self.failed.items()}
