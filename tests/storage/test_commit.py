# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all, and an old checkpoint is invalidated before its bytes change."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.storage import commit

AS_ROOT = os.geteuid() == 0


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Simulate a full disk: no file can exceed ``nbytes``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Trace:
    """Records the order of the relevant system calls, and what they were called on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}
        for name in ("open", "fsync", "replace", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._traced(name, getattr(os, name)))

    def _traced(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if name == "open":
                self._paths[result] = os.fspath(args[0])
            elif name == "fsync":
                self.calls.append((name, os.readlink(f"/proc/self/fd/{args[0]}")))
            else:
                self.calls.append((name, os.fspath(args[name == "replace"])))
            return result

        return call


def names(directory: Path) -> set[str]:
    return set(os.listdir(directory))


@pytest.mark.parametrize("before", [None, b"old"])
def test_write_file_atomic(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    commit.write_file_atomic(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == {"file"}


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commit.write_file_atomic("file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_content_then_name_then_directory_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "file")
    trace = Trace(monkeypatch)
    commit.write_file_atomic(path, b"new")
    (_, synced), replaced, directory = trace.calls
    assert synced.startswith(f"{tmp_path}/.file.") and synced.endswith(".partial")
    assert (replaced, directory) == (("replace", path), ("fsync", str(tmp_path)))


def test_durability_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_FSYNC", "0")
    trace = Trace(monkeypatch)
    commit.write_file_atomic(str(tmp_path / "file"), b"new")
    commit.invalidate(str(tmp_path / "checkpoint"))
    assert not [call for call in trace.calls if call[0] == "fsync"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_file_mode_follows_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        commit.write_file_atomic(str(tmp_path / "file"), b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def refuse(target: Path) -> CheckpointWriteError:
    """Write to ``target``, which must fail and leave no partial file; return the error."""
    with pytest.raises(CheckpointWriteError) as caught:
        commit.write_file_atomic(str(target), bytes(100_000))
    if target.parent.is_dir():
        assert not [name for name in names(target.parent) if name.endswith(".partial")]
    assert caught.value.filename == str(target)
    assert f"cannot write {target}: " in str(caught.value)
    return caught.value


def test_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with file_size_limit(4096):
        error = refuse(path)
    assert error.errno == errno.EFBIG and "The previous content, if any, is untouched" in str(error)
    assert path.read_bytes() == b"old"


def test_missing_directory(tmp_path: Path) -> None:
    assert refuse(tmp_path / "missing" / "file").errno == errno.ENOENT


def test_directory_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    assert refuse(tmp_path / "file").errno == errno.EISDIR
    assert (tmp_path / "file").is_dir()


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    assert refuse(tmp_path / "file" / "below").errno == errno.ENOTDIR
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.skipif(AS_ROOT, reason="root may write anywhere")
def test_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert refuse(tmp_path / "file").errno == errno.EACCES


def test_name_that_is_too_long(tmp_path: Path) -> None:
    assert refuse(tmp_path / ("x" * 255)).errno == errno.ENAMETOOLONG


def test_anything_else_that_goes_wrong_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        commit.write_file_atomic(str(tmp_path / "file"), "text")  # type: ignore[arg-type]
    assert names(tmp_path) == set()


def test_directory_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new content is already in place; the error must not say otherwise."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(_: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(commit, "fsync_directory", fail)
    with pytest.raises(
        CheckpointWriteError, match="It was replaced, but may not outlive a power failure"
    ) as caught:
        commit.write_file_atomic(str(path), b"new")
    assert caught.value.errno == errno.EIO
    assert path.read_bytes() == b"new"


PAYLOAD = ["metadata.json", ".metadata", "ckpt_fast.json", "common.pt", "__0_0.distcp", "__7_1.distcp"]
FOREIGN = ["train_state.pt", "run_config.yaml", "notes.txt", "latest_checkpointed_iteration.txt"]


def fill(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for name in [*PAYLOAD, *FOREIGN, ".metadata.1a2b3c4d.partial"]:
        (directory / name).write_bytes(b"old")
    (directory / "tokenizer").mkdir()


def test_invalidate_removes_what_a_checkpoint_consists_of(tmp_path: Path) -> None:
    fill(tmp_path)
    commit.invalidate(str(tmp_path))
    assert names(tmp_path) == {*FOREIGN, "tokenizer"}


def test_the_seals_go_first_and_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    trace = Trace(monkeypatch)
    commit.invalidate(str(tmp_path))
    calls = [(name, os.path.relpath(path, tmp_path)) for name, path in trace.calls]
    seals = calls.index(("unlink", "metadata.json"))
    expected = []
    for name in ("metadata.json", ".metadata", "ckpt_fast.json"):
        expected += [("unlink", name), ("fsync", ".")]
    assert calls[seals : seals + 6] == expected
    assert {name for call, name in calls[seals + 6 :] if call == "unlink"} >= {"common.pt", "__0_0.distcp"}
    assert not [call for call in calls[:seals] if call[0] == "unlink"]


def test_a_new_directory_is_durable_up_to_the_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(monkeypatch)
    commit.invalidate(str(tmp_path / "run" / "checkpoints" / "iter_0000001"))
    synced = [os.path.relpath(path, tmp_path) for call, path in trace.calls if call == "fsync"]
    assert [path for path in synced if ".." not in path] == [".", "run", "run/checkpoints"]


def test_what_is_above_an_existing_directory_is_made_durable_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    trace = Trace(monkeypatch)
    synced = []
    for iteration in (1, 2):
        commit.invalidate(str(tmp_path / "run" / "checkpoints" / f"iter_{iteration}"))
        synced.append([os.path.relpath(path, tmp_path) for call, path in trace.calls if call == "fsync"])
        trace.calls.clear()
    assert synced[0][:4] == ["run/checkpoints", "run", ".", ".."]
    assert synced[1] == ["run/checkpoints"]


def test_what_is_known_to_be_durable_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run makes a new directory for each checkpoint."""
    monkeypatch.setattr(commit, "_durable", set())
    monkeypatch.setattr(commit, "fsync_directory", lambda path: None)
    for number in range(3000):
        commit.sync_names(str(tmp_path))
        commit.make_directory(str(tmp_path / "run" / str(number)))
        (tmp_path / "run" / str(number)).rmdir()
    assert len(commit._durable) < 2000


def test_an_existing_directory(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    commit.invalidate(str(tmp_path / "checkpoint"))
    commit.invalidate(str(tmp_path / "checkpoint") + "/")
    assert names(tmp_path / "checkpoint") == set()


def test_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commit.invalidate("run/checkpoint")
    assert (tmp_path / "run" / "checkpoint").is_dir()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way_of_the_checkpoint_directory(tmp_path: Path, below: str) -> None:
    (tmp_path / "checkpoint").write_bytes(b"mine")
    target = os.path.join(str(tmp_path / "checkpoint"), below) if below else str(tmp_path / "checkpoint")
    with pytest.raises(
        CheckpointWriteError, match=f"cannot prepare the checkpoint directory {target}"
    ) as caught:
        commit.invalidate(target)
    assert caught.value.errno == errno.ENOTDIR
    assert (tmp_path / "checkpoint").read_bytes() == b"mine"


def test_files_are_written_in_the_order_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace(monkeypatch)
    commit.write_in_order(str(tmp_path), {"z": b"1", "a": b"2", "seal": b"3"})
    assert [os.path.basename(path) for call, path in trace.calls if call == "replace"] == ["z", "a", "seal"]
    assert (tmp_path / "a").read_bytes() == b"2"


def test_writing_stops_at_the_first_failure(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointWriteError):
        commit.write_in_order(str(tmp_path), {"a": b"1", "b": b"2", "seal": b"3"})
    assert names(tmp_path) == {"a", "b"}
