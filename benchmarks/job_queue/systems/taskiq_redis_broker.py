"""taskiq with taskiq-redis: a list as its broker, which acknowledges nothing; results in Redis.

Its stream broker stood still now and then when it was run like this (1.2.4).
"""

from __future__ import annotations

import asyncio
import logging

from taskiq import AsyncTaskiqTask
from taskiq.api import run_receiver_task
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

from benchmarks.job_queue.systems.tasks import first_word
from benchmarks.job_queue.systems.together import together

AT_ONCE = 100


class System:
    def __init__(self, url: str) -> None:
        logging.getLogger("taskiq").setLevel(logging.ERROR)
        self._runner = asyncio.Runner()
        pool = {"max_connection_pool_size": 10 * AT_ONCE}
        backend = RedisAsyncResultBackend(url, result_ex_time=3600, **pool)
        self._broker = ListQueueBroker(url, **pool).with_result_backend(backend)

        async def answer(prompt: str) -> str:
            return first_word(prompt)

        self._task = self._broker.register_task(answer, task_name="first_word")
        self._tasks: list[AsyncTaskiqTask] = []

    def enqueue(self, prompts: list[str]) -> None:
        self._runner.run(self._broker.startup())
        work = (lambda p=prompt: self._task.kiq(p) for prompt in prompts)
        self._tasks = self._runner.run(together(work, AT_ONCE))

    def work(self, count: int) -> None:
        async def main() -> None:
            backend = self._broker.result_backend
            done = asyncio.Event()
            left, write = count, backend.set_result

            async def count_down(*args: object) -> None:
                nonlocal left
                await write(*args)
                left -= 1
                if not left:
                    done.set()

            backend.set_result = count_down
            receiving = asyncio.create_task(
                run_receiver_task(self._broker, max_async_tasks=AT_ONCE, max_prefetch=AT_ONCE)
            )
            await done.wait()
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            backend.set_result = write

        self._runner.run(main())

    def results(self, count: int) -> list[str]:  # noqa: ARG002
        async def read(task: AsyncTaskiqTask) -> str:
            return (await task.get_result()).return_value

        work = (lambda t=task: read(t) for task in self._tasks)
        return self._runner.run(together(work, AT_ONCE))

    def close(self) -> None:
        self._runner.run(self._broker.shutdown())
        self._runner.close()
