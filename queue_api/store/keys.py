"""Every Redis key that batchmill touches, its own and those of RQ's that RQ's API doesn't name.

    batchmill:{run}          hash: queue, total, chunk_size, submitted, fingerprint, content,
                             cancelled, created_at; counters done, prompt_tokens,
                             completion_tokens, suppressed and finish:<reason>
    batchmill:{run}:results  stream of results, in completion order; an entry holds some,
                             as fields named by the requests' indexes
    batchmill:{run}:done     bitmap by request index; who sets a bit may append the result
    batchmill:{run}:partial:<index>:<model>
                             string, the new tokens so far of a long generation, 4 bytes each;
                             gone when it ends
    batchmill:strays:<queue> list of jobs that a worker of another kind took, for ours alone
    batchmill:{wake-<id>}:results
                             stream of one entry that ends a client's blocked read

The braces keep a run's keys in one slot of a Redis Cluster.
"""

from __future__ import annotations

from typing import NamedTuple

from rq.defaults import RQ_KEY_PREFIX
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

__all__ = [
    "MODEL_FIELD",
    "RQ_KEY_PREFIX",
    "RunKeys",
    "canceled_key",
    "execution_key",
    "executions_key",
    "failed_key",
    "finished_key",
    "partial_key",
    "queue_key",
    "return_values_key",
    "scheduled_key",
    "strays_key",
    "wake_key",
    "wip_key",
    "workers_key",
]

MODEL_FIELD = "model"
"""Field of a worker's hash, one that RQ doesn't know: the model and, on a line of its own, its
revision."""


class RunKeys(NamedTuple):
    """The Redis keys of one run, in the order that emit.lua takes them."""

    hash: str
    results: str
    done: str

    @classmethod
    def of(cls, run: str) -> RunKeys:
        base = f"batchmill:{{{run}}}"
        return cls(base, f"{base}:results", f"{base}:done")


def partial_key(run: str, index: int, model: str) -> str:
    """Where a request's tokens so far are kept.

    :param model: says by whose vocabulary and weights
    """
    return f"batchmill:{{{run}}}:partial:{index}:{model}"


def wake_key(reader: str) -> str:
    """What a client's reader listens to besides results, to be woken by."""
    return RunKeys.of(f"wake-{reader}").results


def queue_key(queue: str) -> str:
    """RQ's list of the jobs that wait."""
    return f"{RQ_KEY_PREFIX}:queue:{queue}"


def strays_key(queue: str) -> str:
    """Jobs of that queue that a worker of another kind took, for ours alone; see rescue.lua."""
    return f"batchmill:strays:{queue}"


def wip_key(queue: str) -> str:
    """RQ's registry of executions, by when their lease ends."""
    return f"{RQ_KEY_PREFIX}:wip:{queue}"


def failed_key(queue: str) -> str:
    """RQ's registry of failed jobs."""
    return f"{RQ_KEY_PREFIX}:failed:{queue}"


def scheduled_key(queue: str) -> str:
    """RQ's registry of jobs that wait for their time, such as that of a retry."""
    return f"{RQ_KEY_PREFIX}:scheduled:{queue}"


def finished_key(queue: str) -> str:
    """RQ's registry of finished jobs."""
    return f"{RQ_KEY_PREFIX}:finished:{queue}"


def canceled_key(queue: str) -> str:
    """RQ's registry of cancelled jobs."""
    return f"{RQ_KEY_PREFIX}:canceled:{queue}"


def execution_key(job_id: str, execution_id: str) -> str:
    """RQ's hash of one execution."""
    return f"{RQ_KEY_PREFIX}:execution:{job_id}:{execution_id}"


def executions_key(job_id: str) -> str:
    """RQ's registry of a job's executions."""
    return f"{RQ_KEY_PREFIX}:executions:{job_id}"


def return_values_key(job_id: str) -> str:
    """RQ's stream of a job's return values."""
    return f"{RQ_KEY_PREFIX}:results:{job_id}"


def workers_key(queue: str) -> str:
    """RQ's set of the workers that serve a queue."""
    return str(WORKERS_BY_QUEUE_KEY % queue)
