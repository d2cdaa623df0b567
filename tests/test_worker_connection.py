"""Every kind of address works, unfit servers are refused in clear words, passwords stay secret."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from kits.worker_kit import WorkerProcess, completed, submit, until, workers

from queue_api.client.client import Client
from queue_api.connection.address import safe_url
from queue_api.connection.child_process import child_environment, python_module
from queue_api.connection.connect import check_server, connect, connect_async
from queue_api.connection.embedded import EmbeddedRedis, find_server
from queue_api.connection.failures import friendly
from queue_api.connection.settings import DEFAULT_REDIS_URL, QueueSettings
from queue_api.wire.errors import (
    ConfigurationError,
    RedisAuthError,
    RedisServerError,
    RedisUnavailableError,
)
from workers.settings import WorkerSettings

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
        ("unix:///run/a@b.sock", "unix:///run/a@b.sock"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis+sentinel://h:1,i:2/s/0", "redis+sentinel://h:1,i:2/s/0"),
        # not as they have to be written
        ("redis://:p/a@h:1/0", "redis://:***@h:1/0"),
        ("redis://u:p#a@h/0", "redis://u:***@h/0"),
        ("redis://u:p?a@h/0", "redis://u:***@h/0"),
        ("redis://u:p://a@h/0", "redis://u:***@h/0"),
        ("unix://u:a/b@/run/redis.sock", "unix://u:***@/run/redis.sock"),
        ("u:p@h:1", "u:***@h:1"),
        ("redis://:p", "redis://:***"),
    ],
)
def test_passwords_are_never_shown(url, shown):
    assert safe_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://:{}@h:1/0",
        "redis://user:{}@h/0",
        "rediss://user:{}@h:1",
        "unix://user:{}@/run/redis.sock",
        "redis+sentinel://user:{}@h:1,i:2/service/0",
    ],
)
@pytest.mark.parametrize(
    "password", ["xq/zz", "xq#zz", "xq?zz", "12/zz", "xq?a=b#zz", "/zz", "#zz"]
)
def test_a_password_that_has_to_be_encoded_is_told_and_kept_secret(url, password):
    for open_it in (connect, connect_async):
        with pytest.raises(ConfigurationError, match="%2F %3F %23") as told:
            open_it(url.format(password))
        assert "zz" not in str(told.value) and "xq" not in str(told.value)


def test_an_encoded_password_reaches_the_server(server, connection):
    password = "p/a#s?s@w:o r%d"
    connection.execute_command("ACL", "SETUSER", "odd", "reset", "on", f">{password}", "+ping")
    url = server.url.replace("unix://", f"unix://odd:{quote(password, safe='')}@")
    with connect(url) as client:
        assert client.ping()
    assert "p%2Fa" not in safe_url(url)


FLAG, OURS, SHARED = (f"unix:///nowhere/{name}.sock" for name in ("flag", "ours", "shared"))


@pytest.mark.parametrize(
    ("flag", "environment", "chosen"),
    [
        (FLAG, {"BATCHMILL_REDIS_URL": OURS, "REDIS_URL": SHARED}, FLAG),
        (FLAG, {"BATCHMILL_REDIS_URL": OURS}, FLAG),
        (FLAG, {"REDIS_URL": SHARED}, FLAG),
        (None, {"BATCHMILL_REDIS_URL": OURS, "REDIS_URL": SHARED}, OURS),
        (None, {"REDIS_URL": SHARED}, SHARED),
        (None, {}, DEFAULT_REDIS_URL),
    ],
)
def test_a_flag_goes_before_our_variable_and_that_before_the_shared_one(
    monkeypatch, flag, environment, chosen
):
    for name in ("BATCHMILL_REDIS_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Client(flag).settings.redis_url == chosen
    for settings in (QueueSettings, WorkerSettings):
        found = settings.load(redis_url=flag)
        assert found.redis_url == chosen
        assert found.names_redis == (chosen != DEFAULT_REDIS_URL)


@pytest.mark.parametrize("named_by", ["flag", "BATCHMILL_REDIS_URL", "REDIS_URL"])
def test_the_workers_of_a_run_go_where_the_run_goes(server, connection, tmp_path, named_by):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a b"}\n')
    names = ["flag", "BATCHMILL_REDIS_URL", "REDIS_URL"]
    addresses = {"BATCHMILL_REDIS_URL": OURS, "REDIS_URL": SHARED}
    # what goes before is away, what comes after leads nowhere
    addresses = {n: a for n, a in addresses.items() if names.index(n) > names.index(named_by)}
    options = ["--model", "echo:tokens=2", "-o", str(tmp_path / "out.jsonl")]
    if named_by == "flag":
        options += ["--redis-url", server.url]
    else:
        addresses[named_by] = server.url
    environment = {k: v for k, v in child_environment().items() if k not in names} | addresses
    subprocess.run(
        python_module("batchmill", "run", str(tmp_path / "in.jsonl"), *options),
        env=environment,
        check=True,
        timeout=60,
    )
    assert '"text":"a b"' in (tmp_path / "out.jsonl").read_text()
    assert connection.keys("batchmill:*")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc to read it from")
@pytest.mark.parametrize("form", ["--redis-url {}", "--redis-url={}"])
def test_no_process_of_ours_shows_a_password_in_its_arguments(server, connection, tmp_path, form):
    everything = ["reset", "on", ">hush", "allkeys", "allchannels", "+@all"]
    connection.execute_command("ACL", "SETUSER", "somebody", *everything)
    url = server.url.replace("unix://", "unix://somebody:hush@")
    (tmp_path / "in.jsonl").write_text('{"prompt": "a b"}\n')
    files = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    options = ["--model", "echo:tokens=100,step_s=0.02", *form.format(url).split()]
    run = subprocess.Popen(python_module("batchmill", "run", *files, *options))
    try:
        until(lambda: workers(connection) or run.poll() is not None)
        (worker,) = workers(connection)
        for pid in (run.pid, worker.pid):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"batchmill" in arguments and b"hush" not in arguments
        assert run.wait(60) == 0
    finally:
        run.kill()


def test_a_worker_without_redis_says_so_and_ends(tmp_path):
    worker = WorkerProcess("redis://127.0.0.1:1/0", tmp_path / "worker.log")
    assert worker.wait() != 0
    assert "no Redis answers at redis://127.0.0.1:1/0" in worker.said()
