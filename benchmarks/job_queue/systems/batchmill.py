"""batchmill: `Client.submit`, one worker with the engine that echoes, `Run.results`."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

from batchmill import Client, QueueSettings
from queue_api.connection.connect import connect
from queue_api.store.keys import RunKeys
from workers.running.echo_engine import EchoEngine
from workers.settings import WorkerSettings
from workers.worker import BatchWorker

RUN = "bench"
LOOK_EVERY_S = 0.005


class System:
    """:param chunk_size: requests to an RQ job"""

    def __init__(self, url: str, chunk_size: int, max_num_seqs: int = 256) -> None:
        self._runner = asyncio.Runner()
        self._settings = QueueSettings(redis_url=url, chunk_size=chunk_size)
        self._worker = WorkerSettings(redis_url=url, model="echo:", max_num_seqs=max_num_seqs)
        self._client: Client = self._runner.run(self._open())
        self._connection = connect(url)

    async def _open(self) -> Client:
        return await Client(settings=self._settings).__aenter__()

    def enqueue(self, prompts: list[str]) -> None:
        requests = ({"prompt": prompt, "max_tokens": 1} for prompt in prompts)
        self._runner.run(self._client.submit(requests, RUN))

    def work(self, count: int) -> float:
        """Returns the seconds until all are answered; draining the worker comes after that."""
        started_at = time.perf_counter()
        ended_at: list[float] = []

        def watch() -> None:
            connection = connect(self._settings.redis_url, max_connections=1)
            while int(connection.hget(RunKeys.of(RUN).hash, "done") or 0) < count:  # type: ignore[arg-type]
                time.sleep(LOOK_EVERY_S)
            ended_at.append(time.perf_counter())
            connection.close()
            os.kill(os.getpid(), signal.SIGTERM)

        watcher = threading.Thread(target=watch)
        watcher.start()
        BatchWorker(self._worker, EchoEngine(), self._connection).serve()
        watcher.join()
        return ended_at[0] - started_at

    def results(self, count: int) -> list[str]:
        async def read() -> list[str]:
            texts = {}
            async for result in self._client.run(RUN).results():
                texts[result.index] = result.text
            return [texts[index] for index in range(count)]

        return self._runner.run(read())

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()
        self._connection.close()
