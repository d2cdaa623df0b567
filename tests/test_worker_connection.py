"""Every kind of address works, unfit servers are refused in clear words, passwords stay secret."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from kits.worker_kit import WorkerProcess, completed, submit, until, workers

from queue_api.connection.address import safe_url
from queue_api.connection.connect import check_server, connect
from queue_api.connection.embedded import EmbeddedRedis, find_server
from queue_api.connection.failures import friendly
from queue_api.wire.errors import (
    ConfigurationError,
    RedisAuthError,
    RedisServerError,
    RedisUnavailableError,
)

pytestmark = pytest.mark.servers


def make_certificate(folder: Path) -> dict[str, Path]:
    paths = {"key": folder / "key.pem", "cert": folder / "cert.pem"}
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    files = ["-keyout", str(paths["key"]), "-out", str(paths["cert"])]
    subprocess.run([*command, *files], check=True, capture_output=True)
    return paths


@pytest.fixture
def tls_url(tmp_path: Path) -> Iterator[str]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    paths = make_certificate(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(find_server()), "--port", "0", "--tls-port", str(port), "--save", ""]
    command += ["--tls-cert-file", str(paths["cert"]), "--tls-key-file", str(paths["key"])]
    command += ["--tls-auth-clients", "no", "--requirepass", "hush", "--dir", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"rediss://:hush@localhost:{port}/0?ssl_ca_certs={paths['cert']}"
    try:
        until(lambda: answers(url) or server.poll() is not None)
        if server.poll() is not None:
            pytest.skip("this Redis is built without TLS")
        yield url
    finally:
        server.kill()
        server.wait()


def answers(url: str) -> bool:
    try:
        return bool(connect(url).ping())
    except redis.ConnectionError:
        return False


def test_a_worker_serves_over_tls_and_keeps_the_password_to_itself(tls_url, tmp_path):
    connection = connect(tls_url)
    worker = WorkerProcess(tls_url, tmp_path / "worker.log")
    try:
        until(lambda: workers(connection) or worker.process.poll() is not None)
        submit(connection, "run", ["a b"] * 4)
        assert {result.ok for result in completed(connection, "run", 4)} == {True}
        assert "hush" not in worker.said()
    finally:
        worker.kill()


def test_a_server_that_may_evict_is_refused(server, connection):
    connection.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(RedisServerError, match=r"allkeys-lru.*noeviction"):
            check_server(connection)
    finally:
        connection.config_set("maxmemory-policy", "noeviction")
    assert check_server(connection).warnings() == []


def test_a_replica_is_refused():
    with EmbeddedRedis() as primary, EmbeddedRedis() as replica:
        assert connect(primary.url).ping()
        # it needn't find its primary to be a replica
        connect(replica.url).replicaof("127.0.0.1", "1")
        with pytest.raises(RedisServerError, match="replica"):
            check_server(connect(replica.url))


def test_lost_persistence_is_told(server, connection):
    connection.config_set("appendonly", "no")
    try:
        (warning,) = check_server(connection).warnings()
        assert "may lose queued work: AOF off" in warning
    finally:
        connection.config_set("appendonly", "yes")


def test_errors_are_told_in_clear_words(server, connection):
    nobody = "redis://user:s3cret@127.0.0.1:1/0"
    with pytest.raises(redis.ConnectionError) as lost:
        connect(nobody).ping()
    told = friendly(lost.value, nobody)
    assert isinstance(told, RedisUnavailableError)
    assert "redis://user:***@127.0.0.1:1/0" in str(told) and "s3cret" not in str(told)
    wrong = server.url.replace("unix://", "unix://nobody:s3cret@")
    with pytest.raises(redis.AuthenticationError) as refused:
        connect(wrong).ping()
    assert isinstance(friendly(refused.value, wrong), RedisAuthError)


@pytest.mark.parametrize(
    "url", ["localhost:6379", "http://localhost", "redis://localhost:port", ""]
)
def test_an_address_that_cant_be_read_is_told(url):
    with pytest.raises(ConfigurationError, match="isn't a Redis URL"):
        connect(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:p@h:1/0", "redis://:***@h:1/0"),
        ("redis://u:p@ss@h/0", "redis://u:***@h/0"),
        ("unix://u:p@/run/redis.sock", "unix://u:***@/run/redis.sock"),
        ("unix:///run/x?password=p&db=1", "unix:///run/x?password=***&db=1"),
    ],
)
def test_passwords_are_never_shown(url, shown):
    assert safe_url(url) == shown


def test_a_worker_without_redis_says_so_and_ends(tmp_path):
    worker = WorkerProcess("redis://127.0.0.1:1/0", tmp_path / "worker.log")
    assert worker.wait() != 0
    assert "no Redis answers at redis://127.0.0.1:1/0" in worker.said()
