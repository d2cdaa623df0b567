"""Commands as connections of asyncio write them; redis-py's own connections are the oracle."""

from __future__ import annotations

import pytest
import redis

from queue_api.connection.connect import connect, connect_async
from queue_api.connection.hiredis_packing import Packing

COMMANDS = [
    ("PING",),
    ("SCRIPT LOAD", "return 'é'"),
    ("EVALSHA", "abc", 2, "key", b"\x00\xff\r\n", -1, 0.1 + 0.2, 1e-7, 1e22, ""),
    ("SET", "large", b"x" * 100_000),
    ("SET", "view", memoryview(b"bytes")),
]


def packing_connection(url: str) -> Packing:
    return connect_async(url).connection_pool.make_connection()


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/0",
        "rediss://localhost:6379/0",
        "unix:///run/redis.sock",
        "redis+sentinel://localhost:26379/mymaster/0",
    ],
)
def test_commands_are_packed_as_redis_py_packs_them(url):
    oracle = connect("redis://localhost").connection_pool.make_connection()
    ours = packing_connection(url)
    for command in COMMANDS:
        assert b"".join(ours.pack_command(*command)) == b"".join(oracle.pack_command(*command))
    assert b"".join(ours.pack_commands(COMMANDS)) == b"".join(oracle.pack_commands(COMMANDS))


@pytest.mark.parametrize("argument", [None, ["a"], True])
def test_what_is_no_text_bytes_or_number_is_refused(argument):
    with pytest.raises(redis.DataError):
        packing_connection("redis://localhost").pack_command("SET", "key", argument)
