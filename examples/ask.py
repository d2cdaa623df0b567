"""Ask a few questions through the queue and print the answers with their timings.

Needs Redis (REDIS_URL) and a worker: `batchmill worker --model demo`.
"""

from __future__ import annotations

import asyncio

from batchmill import Client

QUESTIONS = ["What is 12 + 30?", "Reverse the word LAMP.", "What day comes after Monday?"]


async def main() -> None:
    async with Client() as client:
        results = await asyncio.gather(
            *(client.generate(question, max_tokens=16) for question in QUESTIONS)
        )
    for question, result in zip(QUESTIONS, results, strict=True):
        result.raise_for_error()
        print(f"{question:32} {result.text:10} {result.timings.total_s * 1000:6.1f} ms")


if __name__ == "__main__":
    asyncio.run(main())
