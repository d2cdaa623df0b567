"""Enters a worker under its name in RQ; a name whose holder may live is waited for."""

from __future__ import annotations

import logging
import time
from typing import cast

import redis
from rq import worker_registration
from rq.queue import Queue
from rq.utils import as_text, now
from rq.worker.base import BaseWorker, WorkerStatus

from queue_api.connection.failures import REDIS_ERRORS, is_passing
from queue_api.store.keys import MODEL_FIELD
from workers.rq_side.process_identity import is_certainly_gone

__all__ = ["PROCESS", "register", "warn_of_others"]

logger = logging.getLogger(__name__)

PROCESS = "process"
"""Field of the worker's hash, one that RQ doesn't know: see process_identity."""
LOOK_AGAIN_S = 0.5
REMIND_S = 30.0


def register(worker: BaseWorker, connection: redis.Redis) -> None:
    """Register the worker's birth; wait, for as long as it takes, until its name is free.

    It is once its holder has signed off, is certainly gone, or has let its entry lapse.
    """
    remind_at = 0.0
    while True:
        try:
            if _try(worker, connection):
                return
            if time.monotonic() >= remind_at:
                remind_at = time.monotonic() + REMIND_S
                _tell(worker, connection)
        except redis.WatchError:
            continue  # it beat, or somebody else took the name
        except REDIS_ERRORS as error:
            if not is_passing(error):
                raise
            logger.warning("Redis is away (%s); the model stays loaded", error)
        time.sleep(LOOK_AGAIN_S)


def warn_of_others(worker: BaseWorker, connection: redis.Redis) -> None:
    """Tell of live workers of another kind on our queues, such as stock RQ's."""
    try:
        others = {queue.name: _others(queue, connection) for queue in worker.queues}
    except REDIS_ERRORS as error:
        if not is_passing(error):
            raise
        return
    for queue_name, keys in others.items():
        for key in keys:
            logger.warning(
                "%s serves queue %s as well and isn't batchmill's: it can't run our jobs, and "
                "those it takes come back late; end it or give batchmill a queue of its own",
                key,
                queue_name,
            )


def _others(queue: Queue, connection: redis.Redis) -> list[str]:
    found = []
    for key in worker_registration.get_keys(queue=queue, connection=connection):
        birth, model = cast(
            "list[bytes | None]", connection.hmget(as_text(key), "birth", MODEL_FIELD)
        )
        if birth is not None and model is None:
            found.append(as_text(key))
    return found


def _try(worker: BaseWorker, connection: redis.Redis) -> bool:
    """Take the name if it is free; True if it was, and nobody else was faster."""
    with connection.pipeline() as pipe:
        pipe.watch(worker.key)  # type: ignore[no-untyped-call]
        is_known = bool(pipe.exists(worker.key))
        death, identity = cast("list[bytes | None]", pipe.hmget(worker.key, "death", PROCESS))
        if is_known and death is None:
            if identity is None or not is_certainly_gone(identity.decode(errors="replace")):
                return False
            logger.warning("worker %s: the process that had this name is gone", worker.name)
        # as BaseWorker.register_birth does, which looks and writes in two steps
        pipe.multi()
        pipe.delete(worker.key)
        worker.birth_date = worker.last_heartbeat = now()
        pipe.hset(worker.key, mapping=worker.serialize())
        worker_registration.register(worker, pipe)
        worker.set_state(WorkerStatus.STARTED, pipeline=pipe)
        pipe.expire(worker.key, worker.worker_ttl + 60)
        pipe.execute()
    return True


def _tell(worker: BaseWorker, connection: redis.Redis) -> None:
    names = ("hostname", "pid", "last_heartbeat")
    fields = cast("list[bytes | None]", connection.hmget(worker.key, *names))
    host, pid, seen = ((field or b"?").decode(errors="replace") for field in fields)
    logger.warning(
        "a worker named %r may be alive (pid %s on %s, last seen %s): waiting until it ends, or "
        "for its entry to lapse, at most %d s after it was seen; if both are to run, choose "
        "another BATCHMILL_NAME",
        worker.name,
        pid,
        host,
        seen,
        worker.worker_ttl + 60,
    )
