"""What the tests of the client share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from queue_api.store.jobs import GenerateJob, GenerateQueue, decode_chunk, parse_item
from queue_api.store.keys import RunKeys
from queue_api.store.runs import emit_args
from queue_api.store.scripts import load_script
from queue_api.wire.schemas import (
    CompletionOutput,
    FinishReason,
    GenerationRequest,
    GenerationResult,
)


def rq_queue(connection: redis.Redis, name: str = "batchmill") -> GenerateQueue:
    return GenerateQueue(name, connection=connection, serializer=JSONSerializer)


def rq_job(connection: redis.Redis, job_id: str) -> GenerateJob:
    return GenerateJob.fetch(job_id, connection, serializer=JSONSerializer)


def run_keys(connection: redis.Redis) -> list[str]:
    return sorted(key.decode() for key in connection.keys("batchmill:*"))


class Answerer:
    """Takes jobs off a queue and emits the results a worker would, at moments the test chooses.

    It has no leases and no retries: tests of those use real workers.
    """

    def __init__(self, connection: redis.Redis) -> None:
        self.connection = connection
        self._emit = connection.register_script(load_script("emit"))

    def text_of(self, request: GenerationRequest) -> str:
        """The answer to a request."""
        return f"answer to {request.prompt}"

    def samples_of(self, request: GenerationRequest) -> list[CompletionOutput] | None:
        """All of them, where several are asked for."""
        return None

    def answer(self, jobs: int = 2**30, queue: str = "batchmill") -> int:
        """Answer so many jobs, or all there are; returns how many requests that were."""
        answered = 0
        for _ in range(jobs):
            job_id = self.connection.lpop(f"rq:queue:{queue}")
            if job_id is None:
                break
            job = rq_job(self.connection, job_id.decode())
            data = self.connection.hget(job.key, "data")
            chunk = decode_chunk(job.id, data)
            results = []
            for index, item in chunk.items:
                request = parse_item(item)
                results.append(
                    GenerationResult(
                        id=request.id,
                        run=chunk.run,
                        index=index,
                        text=self.text_of(request),
                        outputs=self.samples_of(request),
                        finish_reason=FinishReason.STOP,
                        prompt_tokens=2,
                        completion_tokens=3,
                        metadata=request.metadata,
                    )
                )
            self._emit(RunKeys.of(chunk.run), emit_args(results))
            job.set_status(JobStatus.FINISHED)
            answered += len(results)
        return answered

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Answer all that comes while the block lasts."""

        ended = False

        async def go_on() -> None:
            while not ended:
                await asyncio.to_thread(self.answer)
                await asyncio.sleep(0.002)

        task = asyncio.create_task(go_on())
        try:
            yield
        finally:
            # not cancelled: the thread would go on, and answer what comes behind the block
            ended = True
            await task
