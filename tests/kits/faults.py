"""What makes a real server say each of the words by which it refuses, and stop saying it.

Each is a context manager over a server and an administrator's connection to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import redis
from kits.worker_kit import until

from queue_api.connection.connect import connect
from queue_api.connection.embedded import EmbeddedRedis

Fault = Callable[[EmbeddedRedis, redis.Redis], AbstractContextManager[None]]


@contextmanager
def no_replicas(server: EmbeddedRedis, admin: redis.Redis) -> Iterator[None]:
    """It wants a replica to write to, and has none."""
    admin.config_set("min-replicas-to-write", 1)
    try:
        yield
    finally:
        admin.config_set("min-replicas-to-write", 0)


@contextmanager
def full_disk(server: EmbeddedRedis, admin: redis.Redis) -> Iterator[None]:
    """Its last snapshot couldn't be written, as on a full disk."""
    in_its_place = Path(admin.config_get("dir")["dir"]) / "dump.rdb" / "in its place"
    in_its_place.parent.unlink(missing_ok=True)
    in_its_place.mkdir(parents=True)
    admin.config_set("stop-writes-on-bgsave-error", "yes")
    admin.config_set("save", "1000000 1000000")
    admin.bgsave()
    until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err")
    try:
        yield
    finally:
        in_its_place.rmdir()
        in_its_place.parent.rmdir()
        admin.bgsave()
        until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "ok")
        admin.config_set("save", "")


@contextmanager
def long_script(server: EmbeddedRedis, admin: redis.Redis) -> Iterator[None]:
    """Somebody's script doesn't end, until somebody else ends it."""
    admin.config_set("lua-time-limit", 50)

    def loop() -> None:
        with connect(server.url) as other, suppress(redis.ResponseError):
            other.eval("while true do end", 0)

    looping = threading.Thread(target=loop)
    looping.start()
    until(lambda: said_by(lambda: admin.get("key")).startswith("BUSY"))
    try:
        yield
    finally:
        admin.script_kill()
        looping.join()


@contextmanager
def loading(server: EmbeddedRedis, admin: redis.Redis) -> Iterator[None]:
    """It crashed and reads its file, which is long."""
    fill = "for i = 1, 500000 do redis.call('SET', 'filler', i) end redis.call('DEL', 'filler')"
    admin.eval(fill, 0)
    ready = threading.Event()

    def restart() -> None:
        server.restart(kill=True)
        ready.set()
        threading.Event().wait()  # the server ends with the thread that started it

    threading.Thread(target=restart, daemon=True).start()
    until(lambda: "loading" in said_by(lambda: admin.get("key")))
    try:
        yield
    finally:
        ready.wait()
        admin.bgrewriteaof()
        until(lambda: not admin.info("persistence")["aof_rewrite_in_progress"])


@contextmanager
def out_of_memory(server: EmbeddedRedis, admin: redis.Redis) -> Iterator[None]:
    """It has less memory than its data take."""
    admin.config_set("maxmemory", 1)
    try:
        yield
    finally:
        admin.config_set("maxmemory", 0)


@contextmanager
def replica(server: EmbeddedRedis, admin: redis.Redis) -> Iterator[None]:
    """It has become the replica of a server that can't be reached."""
    admin.replicaof("127.0.0.1", "1")
    try:
        yield
    finally:
        admin.replicaof("NO", "ONE")


@contextmanager
def silent_replica(server: EmbeddedRedis, admin: redis.Redis) -> Iterator[None]:
    """The same, and it doesn't tell what it knows either."""
    admin.config_set("replica-serve-stale-data", "no")
    with replica(server, admin):
        yield
    admin.config_set("replica-serve-stale-data", "yes")


@contextmanager
def forgotten_scripts(server: EmbeddedRedis, admin: redis.Redis) -> Iterator[None]:
    """It knows no script any more."""
    admin.script_flush()
    yield


PASSING: dict[str, Fault] = {
    "NOREPLICAS": no_replicas,
    "MISCONF": full_disk,
    "BUSY": long_script,
    "LOADING": loading,
    "OOM": out_of_memory,
    "READONLY": replica,
    "MASTERDOWN": silent_replica,
    "NOSCRIPT": forgotten_scripts,
}
"""By code, what passes."""


def said_by(command: Callable[[], object]) -> str:
    """What it raised, as text; nothing if it went through."""
    try:
        command()
    except redis.RedisError as error:
        return str(error)
    return ""
