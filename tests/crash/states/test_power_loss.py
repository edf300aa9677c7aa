# SPDX-License-Identifier: Apache-2.0
"""The power fails between any two syncs, and the disk keeps only what it must, or also part of the rest.

A disk guarantees that a file has the content of its last fsync and a directory the names of its last fsync.
Everything since then may or may not have reached the disk, independently for each name and file. The model
below tracks the promised and the visible state, and lays out possible disks.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_fast import native
from tests.crash.states.scenario import check, is_saved_twice, save_iteration, train

SEEDS = 2


class Disk:
    """The promised state of the files below ``root``, by inode: contents, and names in directories."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._directories: set[int] = set()
        self._held: list[int] = []
        self._sync_directory(root)

    def sync(self, descriptor: int) -> None:
        """Record an fsync."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(self.root):
            return
        self._held.append(os.dup(descriptor))  # so that its inode is not reused
        if os.path.isdir(path):
            self._sync_directory(path)
        else:
            self._contents[os.fstat(descriptor).st_ino] = Path(path).read_bytes()

    def close(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def _sync_directory(self, path: str) -> None:
        entries = list(os.scandir(path))
        self._names[os.stat(path).st_ino] = {entry.name: entry.inode() for entry in entries}
        self._directories |= {entry.inode() for entry in entries if entry.is_dir()}

    def after_power_loss(self, target: str, luck: random.Random | None) -> None:
        """Lay out a possible disk: only what is promised, or also a random part of the rest."""
        shutil.rmtree(target, ignore_errors=True)
        visible = {}
        for path, _, files in os.walk(self.root):
            for name in files:
                visible[os.stat(os.path.join(path, name)).st_ino] = os.path.join(path, name)
        self._lay_out(self.root, os.stat(self.root).st_ino, target, luck, visible)

    def _lay_out(
        self, source: str, inode: int, target: str, luck: random.Random | None, visible: dict[int, str]
    ) -> None:
        os.mkdir(target)
        for name, child in self._names_of(source, inode, luck):
            path = os.path.join(source, name)
            if child in self._directories or (os.path.isdir(path) and os.stat(path).st_ino == child):
                self._lay_out(path, child, os.path.join(target, name), luck, visible)
            else:
                content = self._contents.get(child, b"")
                if luck and child in visible and luck.random() < 0.5:
                    content = Path(visible[child]).read_bytes()
                    if child not in self._contents and luck.random() < 0.5:
                        content = content[: len(content) // 2]
                Path(target, name).write_bytes(content)

    def _names_of(self, source: str, inode: int, luck: random.Random | None) -> Iterator[tuple[str, int]]:
        promised = self._names.get(inode, {})
        current = {}
        if luck and os.path.isdir(source):
            current = {entry.name: entry.inode() for entry in os.scandir(source)}
        for name in sorted({*promised, *current}):
            reached = luck is not None and luck.random() < 0.5
            child = current.get(name) if reached else promised.get(name)
            if child is not None:
                yield name, child


@pytest.mark.parametrize("start", [1, 5], ids=["new directories", "over itself"])
def test_power_fails_after_every_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    root, up_again = str(tmp_path / "run"), str(tmp_path / "up again")
    os.mkdir(root)
    with native.using("fallback"):
        for iteration in range(max(1, start - 2), start):
            save_iteration(root, iteration)
        disk = Disk(root)
        for path, _, files in os.walk(root):
            for name in ["", *files]:
                descriptor = os.open(os.path.join(path, name), os.O_RDONLY)
                disk.sync(descriptor)
                os.close(descriptor)
        latest, states = 0, 0
        luck, one_at_a_time = random.Random(start), threading.Lock()

        def sync(descriptor: int) -> None:
            nonlocal latest, states
            with one_at_a_time:
                # Before it: a random part of everything since the last sync; then this sync is done.
                for _ in range(SEEDS):
                    disk.after_power_loss(up_again, luck)
                    assert check(up_again) >= latest, "a checkpoint that was published is gone"
                disk.sync(descriptor)
                disk.after_power_loss(up_again, None)
                before, latest = latest, check(up_again)
                assert latest >= before
                states += SEEDS + 1

        monkeypatch.setattr(os, "fsync", sync)
        train(root, 1 if is_saved_twice(start) else 2)
    disk.close()
    assert latest >= start and states > 20 * (SEEDS + 1)


def test_the_model_loses_what_is_not_synced(tmp_path: Path) -> None:
    """The test above would be worthless if the disks never lost anything."""
    root, up_again = tmp_path / "run", tmp_path / "up again"
    root.mkdir()
    disk = Disk(str(root))
    (root / "file").write_bytes(b"content")
    disk.after_power_loss(str(up_again), None)
    assert os.listdir(up_again) == []
    sync(disk, root)
    disk.after_power_loss(str(up_again), None)
    assert (up_again / "file").read_bytes() == b""
    sync(disk, root / "file")
    (root / "file").rename(root / "renamed")
    disk.after_power_loss(str(up_again), None)
    assert os.listdir(up_again) == ["file"] and (up_again / "file").read_bytes() == b"content"
    sync(disk, root)
    disk.after_power_loss(str(up_again), None)
    assert os.listdir(up_again) == ["renamed"]
    disk.close()


def sync(disk: Disk, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    disk.sync(descriptor)
    os.close(descriptor)
