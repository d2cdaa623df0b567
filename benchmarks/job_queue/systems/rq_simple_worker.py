"""RQ as it comes: `enqueue_many` and a SimpleWorker, which doesn't fork."""

from __future__ import annotations

import logging

import redis
from rq import Queue, SimpleWorker
from rq.job import Job

from benchmarks.job_queue.systems.tasks import first_word

AT_ONCE = 256


class System:
    def __init__(self, url: str) -> None:
        logging.getLogger("rq").setLevel(logging.ERROR)
        self._redis = redis.Redis.from_url(url)
        self._queue = Queue("bench", connection=self._redis)
        self._ids: list[str] = []

    def enqueue(self, prompts: list[str]) -> None:
        self._ids = []
        for start in range(0, len(prompts), AT_ONCE):
            datas = [
                Queue.prepare_data(first_word, (prompt,))
                for prompt in prompts[start : start + AT_ONCE]
            ]
            self._ids += [job.id for job in self._queue.enqueue_many(datas)]

    def work(self, count: int) -> None:  # noqa: ARG002 - until the queue is empty
        worker = SimpleWorker([self._queue], connection=self._redis)
        worker.work(burst=True, logging_level="ERROR")

    def results(self, count: int) -> list[str]:  # noqa: ARG002
        texts = []
        for start in range(0, len(self._ids), AT_ONCE):
            jobs = Job.fetch_many(self._ids[start : start + AT_ONCE], connection=self._redis)
            texts += [job.return_value() for job in jobs if job is not None]
        return texts

    def close(self) -> None:
        self._redis.close()
