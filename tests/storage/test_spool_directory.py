# SPDX-License-Identifier: Apache-2.0
"""Spools of processes that were killed go with the next one, and no others."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckpt_fast.storage import spool_directory
from ckpt_fast.storage.spool_directory import SpoolDirectory

MAKE = """
import sys
from ckpt_fast.storage.spool_directory import SpoolDirectory
spool = SpoolDirectory(sys.argv[1])
path = spool.create()
open(path + "/__0_0.distcp", "wb").write(b"x")
print(path, flush=True)
sys.stdin.read()
"""


def other_process(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process with a spool; return both. It ends when its standard input does."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", MAKE, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str], with_signal: int) -> None:
    process.send_signal(with_signal)
    process.communicate()


def test_a_spool_goes_with_the_next_one_once_its_process_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process, theirs = other_process(tmp_path)
    try:
        ours = SpoolDirectory(tmp_path)
        path = ours.create()
        assert sorted(os.listdir(tmp_path)) == sorted([theirs.name, os.path.basename(path)])
        ours.remove()
        assert os.listdir(tmp_path) == [theirs.name]
    finally:
        end(process, signal.SIGKILL)
    assert (theirs / "__0_0.distcp").exists()
    with caplog.at_level(logging.WARNING):
        path = ours.create()
    assert os.listdir(tmp_path) == [os.path.basename(path)]
    assert caplog.messages == [f"removed {theirs}, the spool of a process that was killed"]
    ours.remove()
    assert os.listdir(tmp_path) == []


def test_a_child_does_not_remove_it(tmp_path: Path) -> None:
    spool = SpoolDirectory(tmp_path)
    path = spool.create()
    child = os.fork()
    if child == 0:
        spool.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.path.isdir(path)
    spool.remove()
    assert os.listdir(tmp_path) == []


def test_what_is_somebody_elses_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{spool_directory._prefix()}{'0' * 16}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / f"{name}.txt").mkdir()
    (parent / "ckpt_fast-0123456789abcdef").mkdir()  # without a host
    (parent / name.replace("0", "1")).write_bytes(b"a file")
    (parent / name.replace("0", "2")).symlink_to(elsewhere)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another-host")
        (parent / f"{spool_directory._prefix()}{'3' * 16}").mkdir()
    before = set(os.listdir(parent))
    spool = SpoolDirectory(parent)
    assert set(os.listdir(parent)) - before == set()
    spool.create()
    assert before < set(os.listdir(parent))
    assert elsewhere.is_dir()
    spool.remove()
    # Of the same host, but of another user.
    (parent / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: os.stat(parent).st_uid + 1)
        spool.create()
    assert (parent / name).is_dir()
    spool.remove()
    spool.create()
    assert not (parent / name).exists()
    spool.remove()


def test_somebody_removes_it_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed, mkdir = [], os.mkdir

    def too_quick(path: str, mode: int) -> None:
        mkdir(path, mode)
        if len(removed) < 2:
            removed.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", too_quick)
    spool = SpoolDirectory(tmp_path)
    path = spool.create()
    assert os.listdir(tmp_path) == [os.path.basename(path)]
    assert path not in removed
    spool.remove()


def test_one_that_somebody_looks_at_just_now_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that sweeps locks what it finds, for the moment in which it looks."""
    mkdir, timers = os.mkdir, []

    def looked_at(path: str, mode: int) -> None:
        mkdir(path, mode)
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        timers.append(threading.Timer(0.2, os.close, (descriptor,)))
        timers[-1].start()

    monkeypatch.setattr(os, "mkdir", looked_at)
    spool = SpoolDirectory(str(tmp_path))
    assert os.path.isdir(spool.create())
    spool.remove()
    assert len(timers) == 1
