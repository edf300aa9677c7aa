# SPDX-License-Identifier: Apache-2.0
"""Small files and the documents in them: read at once or refused at once, whatever is there."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.documents import parse_json, parse_yaml
from ckpt_fast.storage.small_files import read_small_file

SPECIAL = ["FIFO", "socket", "device", "directory"]


def make_special(path: Path, kind: str) -> None:
    """Create something at ``path`` that is not a regular file."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 5


def test_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content" * 100_000)
    (tmp_path / "link").symlink_to("file")
    assert read_small_file(tmp_path / "link") == b"content" * 100_000
    (tmp_path / "file").write_bytes(b"")
    assert read_small_file(str(tmp_path / "file")) == b""


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_refused(tmp_path: Path, kind: str) -> None:
    make_special(tmp_path / "it", kind)
    with pytest.raises(CheckpointCorruptError, match=rf"/it is a {kind}, where .* regular file\. Load an"):
        read_small_file(tmp_path / "it")


def test_missing_file_and_broken_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("link", "missing"):
        with pytest.raises(FileNotFoundError):
            read_small_file(tmp_path / name)


def test_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_small_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(CheckpointCorruptError, match="has 5 bytes, and no such file has more than 4"):
        read_small_file(tmp_path / "file", 4)


def test_sparse_file_that_claims_any_length(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(CheckpointCorruptError, match="has 4398046511104 bytes"):
        read_small_file(tmp_path / "file")


@pytest.mark.parametrize(
    "content",
    [b"[" * 10_000_000, b'{"a":' * 1_000_000, b"{", b"\xff", b"1" * 10_000],
    ids=["deep list", "deep dict", "cut short", "no text", "long number"],
)
def test_json_that_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(content)


LAUGHS = b"a: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"b%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 90)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LAUGHS, "aliases repeat"),
        (b"a: &a [*a]", "contains itself"),
        (b"a: &a {b: [1, {c: *a}]}", "contains itself"),
        (b"[" * 500 + b"]" * 500, "nested too deep"),
        (b"- " * 1_000_000, "nested too deep"),
        (b"x: " + b"1:" * 100_000 + b"1", "a number of 200001 digits"),
        (b"x: 0x" + b"f" * 100_000, "a number of 100002 digits"),
    ],
    ids=[
        "billion laughs",
        "list in itself",
        "mapping in itself",
        "deep",
        "deep block",
        "base 60",
        "hexadecimal",
    ],
)
def test_yaml_that_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(content)


def test_depth_is_bounded_in_a_small_stack() -> None:
    """The parsers' own recursion would crash the process."""
    refusals: list[Exception] = []

    def parse() -> None:
        for content in (b"[" * 100_000, b"- " * 100_000, b"{a: " * 100_000):
            try:
                parse_yaml(content)
            except (ValueError, yaml.YAMLError) as error:
                refusals.append(error)

    before = threading.stack_size(256 << 10)
    try:
        thread = threading.Thread(target=parse)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert len(refusals) == 3


def test_text_that_is_not_yaml_of_plain_data() -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(b"a: !!python/name:os.system")


def test_yaml_that_is_read() -> None:
    text = b"base: &b {x: 1, y: [&n null, *n]}\nmore: {<<: *b, z: 1.5e3}\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml(b"") is None
    assert parse_yaml(b'path: "\\uDC80"') == {"path": "\udc80"}
