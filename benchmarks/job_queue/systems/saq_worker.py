"""saq: a hundred coroutines enqueue at a time, a hundred jobs run at a time."""

from __future__ import annotations

import asyncio

import redis.asyncio as aredis
from saq import Job, Worker
from saq.queue.redis import RedisQueue

from benchmarks.job_queue.systems.tasks import first_word_in_context
from benchmarks.job_queue.systems.together import together

AT_ONCE = 100
NAME = "first_word"
LOOK_EVERY_S = 0.01


class System:
    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        self._queue = RedisQueue(
            aredis.Redis.from_url(url, max_connections=10 * AT_ONCE),
            name="bench",
            max_concurrent_ops=AT_ONCE,
        )
        self._keys: list[str] = []

    def enqueue(self, prompts: list[str]) -> None:
        work = (lambda p=prompt: self._queue.enqueue(NAME, prompt=p) for prompt in prompts)
        jobs: list[Job] = self._runner.run(together(work, AT_ONCE))
        self._keys = [job.key for job in jobs]

    def work(self, count: int) -> None:  # noqa: ARG002 - until the queue is empty
        async def main() -> None:
            worker = Worker(
                self._queue, [(NAME, first_word_in_context_by_name)], concurrency=AT_ONCE
            )
            # its first sweep for stuck jobs would abort what has just been taken off a full queue
            await self._queue.redis.set(self._queue._sweep, 1, ex=600)
            task = asyncio.create_task(worker.start())
            while await self._queue.count("incomplete"):  # noqa: ASYNC110 - it has no such event
                await asyncio.sleep(LOOK_EVERY_S)
            await worker.stop()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._runner.run(main())

    def results(self, count: int) -> list[str]:  # noqa: ARG002
        async def main() -> list[str]:
            texts = []
            for start in range(0, len(self._keys), AT_ONCE):
                jobs = await self._queue.jobs(self._keys[start : start + AT_ONCE])
                texts += [job.result for job in jobs if job is not None]
            return texts

        return self._runner.run(main())

    def close(self) -> None:
        self._runner.run(self._queue.disconnect())
        self._runner.close()


async def first_word_in_context_by_name(context: dict, *, prompt: str) -> str:
    return await first_word_in_context(context, prompt)
