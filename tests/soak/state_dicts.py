# SPDX-License-Identifier: Apache-2.0
"""State dicts through ``ckpt_fast.save``, ``async_save``, ``load`` and torch DCP, into a few directories."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast import FastLoadPlanner, FastSavePlanner, FastStorageReader, FastStorageWriter
from ckpt_fast.doors.dcp.direct.background import wait_for_save
from tests.manifests import manifest_lies, manifest_of
from tests.soak import faults
from tests.soak.contents import Contents, blank, copied, equal
from tests.soak.faults import Fault, flip
from tests.soak.subject import Subject

_DIRECTORIES = 3


class StateDicts(Subject):
    """A few directories, each of which is saved to again and again.

    Of each it knows what may be in it: the last save that succeeded, and those after it that failed, which
    may have been published all the same. None stands for no checkpoint.
    """

    def __init__(self, root: str, counts: Counter[str]) -> None:
        super().__init__(root, counts)
        self._saved: dict[str, list[Any]] = {}
        self._left: dict[str, set[str]] = {}  # files that a fault may have left; they may stay for an hour

    def begin(self, chance: Random) -> None:
        """Make a new state dict."""
        self.empty()
        self._contents = Contents(chance)
        self._left.clear()
        self._saved = {os.path.join(self.root, str(number)): [None] for number in range(_DIRECTORIES)}
        # Process groups of saves in the background are made by the first, without a deadline.
        ckpt_fast.async_save({"first": 1}, os.path.join(self.root, "first")).result()

    def step(self, chance: Random) -> None:
        """Do one thing; saves are the most frequent."""
        directory = chance.choice(sorted(self._saved))
        how = chance.random()
        if how < 0.6:
            self._save(chance, directory)
            if chance.random() < 0.5:
                self._load(chance, directory)
        elif how < 0.67:
            self._save_at_once(chance)
        elif how < 0.85:
            self._load(chance, directory)
        elif how < 0.95:
            self._damage(chance, directory)
        else:
            self._verify(directory)

    def _save(self, chance: Random, directory: str) -> None:
        ways = (self._ours, self._ours_later, self._torchs, self._torchs_later)
        way = chance.choice(ways)
        self.doing = way.__name__.strip("_")
        if chance.random() < 0.3:
            self.doing += f", after {self._contents.change(chance)}"
        self._contents.train(chance)
        expected = copied(self._contents.state)
        fault = self._fault_for(chance, way)
        if self.attempt(chance, fault, lambda: way(chance, directory)):
            self._saved[directory] = [expected]
        else:
            wait_for_save(directory)  # if it was interrupted, it may be published all the same
            self._saved[directory].append(expected)
        if fault is not None:
            left = os.listdir(directory) if os.path.isdir(directory) else []
            self._left.setdefault(directory, set()).update(left)
        self.counts["saves"] += 1

    def _fault_for(self, chance: Random, way: Callable[..., Any]) -> Fault | None:
        if chance.random() > 0.3:
            return None
        found: list[Fault] = [faults.failing_call, faults.full_disk, faults.no_room]
        is_alone = dist.get_world_size() == 1
        if is_alone or way in (self._ours, self._ours_later):  # torch DCP asks for state dicts rank by rank
            found.append(faults.failing_collection)
        if way == self._ours_later:
            found.append(faults.deadline)
        if is_alone:
            found += [faults.interruption] * 2
        return chance.choice(found)

    def _ours(self, chance: Random, directory: str) -> None:
        ckpt_fast.save(self._contents.state, directory, thread_count=chance.choice((None, 1, 3)))

    def _ours_later(self, chance: Random, directory: str) -> None:
        future = ckpt_fast.async_save(self._contents.state, directory)
        self._contents.train(chance)
        future.result()

    def _torchs(self, chance: Random, directory: str) -> None:
        planner = FastSavePlanner() if chance.random() < 0.5 else None
        dcp.save(self._contents.state, storage_writer=FastStorageWriter(directory), planner=planner)

    def _torchs_later(self, chance: Random, directory: str) -> None:
        # A copy of the whole state is asked for, which may exceed a bound.
        with mock.patch.dict(os.environ):
            os.environ.pop("CKPT_FAST_HOST_BUFFER", None)
            future: Any = dcp.async_save(self._contents.state, storage_writer=FastStorageWriter(directory))
            self._contents.train(chance)
            future.result()

    def _save_at_once(self, chance: Random) -> None:
        """Have saves to all directories in flight."""
        self.doing = "several async_save"
        futures = {}
        for directory in self._saved:
            self._contents.train(chance)
            self._saved[directory] = [copied(self._contents.state)]
            futures[directory] = ckpt_fast.async_save(self._contents.state, directory)
        for future in futures.values():
            future.result()
        self.counts["saves"] += len(futures)

    def _load(self, chance: Random, directory: str) -> None:
        way = chance.choice((self._load_ours, self._load_torchs))
        self.doing += f", {way.__name__.strip('_')}"
        self.counts["loads"] += 1
        found = self._found(way, directory)
        assert found is not None, f"{directory} holds none of {len(self._saved[directory])} saves"
        self._saved[directory] = found

    def _found(self, way: Callable[[Any, str], None], directory: str) -> list[Any] | None:
        """Return which save the directory holds, as a list; None if it is none of those it may hold."""
        candidates = self._saved[directory]
        for candidate in reversed(candidates):
            if candidate is None:
                if not os.path.exists(os.path.join(directory, ".metadata")):
                    return [None]
                continue
            target = blank(candidate)
            try:
                way(target, directory)
            except faults.ERRORS as error:
                if len(candidates) == 1 or not faults.is_refusal(error):
                    raise
                continue
            if not faults.anywhere(not equal(target, candidate)):
                return [candidate]
        return None

    def _load_ours(self, target: Any, directory: str) -> None:
        ckpt_fast.load(target, directory)

    def _load_torchs(self, target: Any, directory: str) -> None:
        dcp.load(target, storage_reader=FastStorageReader(directory), planner=FastLoadPlanner())

    def _damage(self, chance: Random, directory: str) -> None:
        """Flip a bit, which a load refuses or need not read, and a verification sees; and flip it back."""
        if self._saved[directory][-1] is None or len(self._saved[directory]) > 1:
            return
        path, back = flip(directory, chance)
        self.doing = f"flip in {os.path.basename(path)}"
        self.counts["fault: flipped bit"] += 1
        (expected,) = self._saved[directory]
        target, way = blank(expected), chance.choice((self._load_ours, self._load_torchs))
        try:
            way(target, directory)
        except faults.ERRORS as error:
            if not faults.is_refusal(error):
                raise
            self.counts["loads refused"] += 1
        else:
            assert equal(target, expected), f"a flipped bit in {path} is loaded"
            self.counts["loads"] += 1
        report = ckpt_fast.verify(directory, deep=True)
        # Without a manifest it may be another program's.
        is_seen = not report.is_sound or any("has no manifest" in line for line in report.notes)
        back()
        name = os.path.basename(path)
        is_its_own = name == ".metadata" or name in manifest_of(Path(directory)).files
        assert is_seen or not is_its_own, f"a flipped bit in {path} is called sound"

    def _verify(self, directory: str) -> None:
        self.doing = "verify"
        if len(self._saved[directory]) == 1 and self._saved[directory][0] is not None:
            report = ckpt_fast.verify(directory, deep=True)
            assert report.is_sound, report.damages
            wrong = set(manifest_lies(Path(directory))) - self._left.get(directory, set())
            assert not wrong, f"the manifest and the directory disagree about {wrong}"
            self.counts["verifications"] += 1
