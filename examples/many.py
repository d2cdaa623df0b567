"""Submit a thousand prompts as one run and count the right answers as they come in.

Needs Redis (REDIS_URL) and workers: `batchmill worker --model demo`. No asyncio here: SyncClient.
"""

from __future__ import annotations

from batchmill import SyncClient


def main() -> None:
    pairs = [(a, b) for a in range(40) for b in range(25)]
    rows = [{"id": f"{a}+{b}", "prompt": f"What is {a} + {b}?", "max_tokens": 8} for a, b in pairs]
    with SyncClient() as client:
        run = client.submit(rows)
        right = 0
        for result in run.results():
            a, b = map(int, result.id.split("+"))
            right += result.text.strip() == str(a + b)
        status = run.status()
    print(f"{right} of {status.total} right; {status.completion_tokens} tokens generated")


if __name__ == "__main__":
    main()
