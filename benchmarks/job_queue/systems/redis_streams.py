"""Bare Redis Streams with a consumer group, pipelined: no retries, no fencing, no dedupe.

As little as a queue can do, hence the limit that the others are measured by.
"""

from __future__ import annotations

import json

import redis

AT_ONCE = 256
REQUESTS, ANSWERS, GROUP = "requests", "answers", "workers"


class System:
    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url)

    def enqueue(self, prompts: list[str]) -> None:
        self._redis.xgroup_create(REQUESTS, GROUP, "0", mkstream=True)
        for start in range(0, len(prompts), AT_ONCE):
            pipeline = self._redis.pipeline(transaction=False)
            for index, prompt in enumerate(prompts[start : start + AT_ONCE], start):
                request = {"id": str(index), "prompt": prompt, "sampling": {"max_tokens": 1}}
                pipeline.xadd(REQUESTS, {"request": json.dumps(request)})
            pipeline.execute()

    def work(self, count: int) -> None:
        left = count
        while left:
            ((_, entries),) = self._redis.xreadgroup(GROUP, "one", {REQUESTS: ">"}, count=AT_ONCE)
            pipeline = self._redis.pipeline(transaction=False)
            for _, fields in entries:
                request = json.loads(fields[b"request"])
                text = request["prompt"].split(None, 1)[0]
                answer = {"id": request["id"], "text": text, "finish_reason": "length"}
                pipeline.xadd(ANSWERS, {"result": json.dumps(answer)})
            ids = [entry_id for entry_id, _ in entries]
            pipeline.xack(REQUESTS, GROUP, *ids)
            pipeline.xdel(REQUESTS, *ids)
            pipeline.execute()
            left -= len(entries)

    def results(self, count: int) -> list[str]:
        texts: dict[int, str] = {}
        last = "0"
        while len(texts) < count:
            ((_, entries),) = self._redis.xread({ANSWERS: last}, count=1000)
            for _, fields in entries:
                answer = json.loads(fields[b"result"])
                texts[int(answer["id"])] = answer["text"]
            last = entries[-1][0]
        return [texts[index] for index in range(count)]

    def close(self) -> None:
        self._redis.close()
