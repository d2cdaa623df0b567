"""arq: it has no bulk enqueue, so a hundred coroutines enqueue at a time."""

from __future__ import annotations

import asyncio

from arq import create_pool
from arq.connections import ArqRedis, RedisSettings
from arq.jobs import Job
from arq.worker import Worker, func

from benchmarks.job_queue.systems.tasks import first_word_in_context
from benchmarks.job_queue.systems.together import together

AT_ONCE = 100
NAME = "first_word"


class System:
    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        self._settings = RedisSettings.from_dsn(url)
        self._pool: ArqRedis = self._runner.run(create_pool(self._settings))
        self._jobs: list[Job] = []

    def enqueue(self, prompts: list[str]) -> None:
        work = (lambda p=prompt: self._pool.enqueue_job(NAME, p) for prompt in prompts)
        self._jobs = self._runner.run(together(work, AT_ONCE))

    def work(self, count: int) -> None:  # noqa: ARG002 - until the queue is empty
        async def main() -> None:
            worker = Worker(
                [func(first_word_in_context, name=NAME)],
                redis_pool=self._pool,
                burst=True,
                handle_signals=False,
                max_jobs=AT_ONCE,
                poll_delay=0.01,
                log_results=False,
            )
            await worker.main()

        self._runner.run(main())

    def results(self, count: int) -> list[str]:  # noqa: ARG002
        work = (lambda j=job: j.result(poll_delay=0.01) for job in self._jobs)
        return self._runner.run(together(work, AT_ONCE))

    def close(self) -> None:
        self._runner.run(self._pool.aclose())
        self._runner.close()
