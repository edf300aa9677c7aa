# SPDX-License-Identifier: Apache-2.0
"""What the errors of multi-storage-client and boto3 mean, those that an S3 server really causes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.errors import CheckpointWriteError, StorageError
from ckpt_fast.storage import objects
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.storage.objects.errors import ObjectErrors, lacks_bucket
from tests.object_server import Fault, ObjectServer
from tests.trainer.objects.bucket import Bucket, new_bucket

ERRORS = ObjectErrors()

REQUESTS: dict[str, Callable[[Any, Path], object]] = {
    "write": lambda client, _: client.write("x", b"x" * 1000),
    "upload": lambda client, path: client.upload_file("x", str(path / "msc.yaml")),
    "upload in parts": lambda client, path: client.upload_file("x", str(path / "large")),
    "read": lambda client, _: client.read("there"),
    "download": lambda client, path: client.download_file("there", str(path / "fetched")),
    "look": lambda client, _: client.info("there"),
    "list": lambda client, _: list(client.list(path="run/")),
    "delete": lambda client, _: client.delete("there"),
}


@pytest.fixture
def bucket(object_server: ObjectServer, tmp_path: Path) -> Iterator[Bucket]:
    bucket = new_bucket(object_server, tmp_path, multipart_threshold=1 << 20, read_timeout=1)
    with bucket.in_use(CKPT_FAST_OUTAGE="0"):
        objects.write(f"msc://{bucket.name}/there", b"content")
        with (tmp_path / "large").open("wb") as file:
            file.truncate(6 << 20)
        yield bucket
    object_server.clear()


def client_of(bucket: Bucket, suffix: str = "") -> Any:
    url = f"msc://{bucket.name}{suffix}/"
    return object_storage(url).resolve_storage_client(url)[0]  # type: ignore[union-attr]


def error_of(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing failed")


@pytest.mark.parametrize("request_name", REQUESTS)
def test_faults(bucket: Bucket, tmp_path: Path, request_name: str) -> None:
    client = client_of(bucket)
    wrong = []
    for kind in ("429", "500", "503", "reset", "truncate", "403"):
        bucket.server.clear()
        bucket.server.fail(Fault(kind, ""))
        error = error_of(lambda: REQUESTS[request_name](client, tmp_path))
        if ERRORS.may_pass(error) is not (kind != "403") or lacks_bucket(error):
            wrong.append((kind, error))
        assert "\n" not in ERRORS.cause_of(error)
    assert wrong == []


def test_no_answer(bucket: Bucket, tmp_path: Path) -> None:
    bucket.server.fail(Fault("delay", "", seconds=3.0))
    assert ERRORS.may_pass(error_of(lambda: client_of(bucket).write("x", b"")))


def test_nobody_there(bucket: Bucket) -> None:
    bucket.server.go_down(0.5)
    error = error_of(lambda: client_of(bucket).write("x", b""))
    assert ERRORS.may_pass(error)
    # A connection that was made just before is cut.
    causes = (
        "EndpointConnectionError: Could not connect to the",
        "ConnectionClosedError: Connection was closed",
    )
    assert ERRORS.cause_of(error).startswith(causes)


@pytest.mark.parametrize("request_name", [name for name in REQUESTS if name != "upload in parts"])
def test_no_bucket(bucket: Bucket, tmp_path: Path, request_name: str) -> None:
    error = error_of(lambda: REQUESTS[request_name](client_of(bucket, "-lost"), tmp_path))
    assert lacks_bucket(error)
    assert not ERRORS.may_pass(error)
    assert ERRORS.cause_of(error) == "the bucket does not exist"


def test_errors_of_the_system() -> None:
    assert ERRORS.may_pass(OSError(errno.EHOSTUNREACH, "no route"))
    assert ERRORS.may_pass(TimeoutError())
    for error in (OSError(errno.ENOSPC, "full"), FileNotFoundError(), ValueError(), KeyError("status")):
        assert not ERRORS.may_pass(error)
    outer = RuntimeError("wrapped")
    outer.__cause__ = ConnectionRefusedError()
    assert ERRORS.may_pass(outer)
    loop = RuntimeError()
    loop.__context__ = loop
    assert not ERRORS.may_pass(loop)


def test_small_requests(bucket: Bucket) -> None:
    url = f"msc://{bucket.name}"
    objects.append(f"{url}/log", b"one ")
    objects.append(f"{url}/log", b"two")
    assert objects.read(f"{url}/log") == b"one two"
    assert [objects.kind_of(f"{url}/{name}") for name in ("log", "run", "run/a")] == ["file", None, None]
    objects.write(f"{url}/run/a", b"")
    assert [objects.kind_of(f"{url}/{name}") for name in ("run", "run/a")] == ["directory", "file"]
    assert objects.names_in(f"{url}/run", "*") == [f"{url}/run/a"]
    objects.delete(f"{url}/run", recursive=True)
    objects.delete(f"{url}/run/a")
    assert bucket.keys() == {"log", "there"}
    with pytest.raises(FileNotFoundError):
        objects.read(f"{url}/none")


def test_small_requests_that_fail(bucket: Bucket) -> None:
    lost, url = f"msc://{bucket.name}-lost/a", f"msc://{bucket.name}/a"
    for ask in (objects.kind_of, objects.read, lambda path: objects.names_in(path, "*")):
        with pytest.raises(StorageError, match=rf"{lost}: the bucket does not exist\."):
            ask(lost)
    with pytest.raises(CheckpointWriteError, match=rf"cannot write {lost}: the bucket does not exist\."):
        objects.write(lost, b"")
    with pytest.raises(StorageError, match="cannot reach msc://unknown-profile/a: "):
        objects.read("msc://unknown-profile/a")
    bucket.server.fail(Fault("403", ""))
    with pytest.raises(StorageError, match=rf"cannot look for {url}: .*Forbidden"):
        objects.kind_of(url)
    with pytest.raises(CheckpointWriteError, match=rf"cannot delete {url}: .*Forbidden") as caught:
        objects.delete(url)
    assert caught.value.filename == url
