# SPDX-License-Identifier: Apache-2.0
"""A training loop with a ``CheckpointManager``: retention, fall-back and failed saves."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from random import Random
from typing import Any, NamedTuple

import torch.distributed as dist

from ckpt_fast import CheckpointManager, KeepEvery, KeepNewest
from ckpt_fast.errors import CheckpointError, CheckpointMismatchError
from tests.soak import faults
from tests.soak.contents import Contents, blank, copied, equal
from tests.soak.faults import Fault, flip
from tests.soak.subject import Subject


class _Saved(NamedTuple):
    """A save of a step; ``is_certain`` unless it failed, and may have been published all the same."""

    step: int
    state: Any
    structure: int
    is_certain: bool


class Managed(Subject):
    """A manager in use, closed and opened again now and then."""

    def __init__(self, root: str, counts: Counter[str]) -> None:
        super().__init__(root, counts)
        self._manager: CheckpointManager | None = None
        self._at = 0  # it goes on from run to run, as the names do that a process has seen

    def begin(self, chance: Random) -> None:
        """Start a run from scratch."""
        self.empty()
        self._contents = Contents(chance)
        self._structure = 0
        self._saved: list[_Saved] = []
        self._damaged: int | None = None  # a step that is still there
        self._open(chance)

    def end(self) -> None:
        """Close the manager."""
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except CheckpointError:
                self.counts["errors at the end"] += 1

    def step(self, chance: Random) -> None:
        """Do one thing; saves are the most frequent."""
        how = chance.random()
        if how < 0.7:
            self._save(chance)
        elif how < 0.85:
            self.doing = "restore"
            self._restore(chance)
        elif how < 0.93:
            self._damage(chance)
        elif how < 0.98:
            self.doing = "restart"
            self.end()
            self._open(chance)
            self._restore(chance)
        else:
            self.doing = "from scratch"
            self._restart(chance)

    def _open(self, chance: Random) -> None:
        self._manager = CheckpointManager(
            self.root,
            policies=chance.choice(([KeepNewest(2)], [KeepNewest(1), KeepEvery(5), KeepNewest(3)])),
            thread_count=chance.choice((None, 2)),
            on_save_failure=chance.choice(("raise", "continue")),
            max_failed_saves=1000,
        )

    def _save(self, chance: Random) -> None:
        manager = self._manager
        assert manager is not None
        self.doing = "save"
        if chance.random() < 0.1:
            self.doing += f", after {self._contents.change(chance)}"
            self._structure += 1
            self._remove_damaged()
        self._at += 0 if self._saved and chance.random() < 0.1 else 1
        self._contents.train(chance)
        expected = copied(self._contents.state)
        failed: list[bool] = []

        def save() -> None:
            future = manager.save(self._at, self._contents.state)
            self._contents.train(chance)
            failed.append(future.exception() is not None)
            manager.wait()

        fault = self._fault(chance)
        is_certain = self.attempt(chance, fault, save) and not failed[0]
        if not is_certain and fault is None:
            raise AssertionError("the save has failed without a reason")
        if is_certain:
            self._saved = [each for each in self._saved if each.step != self._at]
        self._saved.append(_Saved(self._at, expected, self._structure, is_certain))
        self._saved = self._saved[-8:]
        self.counts["saves"] += 1

    @staticmethod
    def _fault(chance: Random) -> Fault | None:
        if chance.random() > 0.25:
            return None
        found: list[Fault] = [faults.failing_call, faults.full_disk, faults.no_room]
        found += [faults.failing_collection, faults.deadline]
        return chance.choice(found)

    def _restore(self, chance: Random, is_damaged: bool = False) -> None:
        """Restore the newest; ``is_damaged`` says that it may be damaged, and an older one taken."""
        manager = self._manager
        assert manager is not None
        self.counts["loads"] += 1
        for candidate in reversed(self._saved):
            target = blank(candidate.state)
            try:
                step = manager.restore(target)
            except CheckpointMismatchError:
                continue  # it is another one
            except CheckpointError:
                assert is_damaged and not self._has_another()
                self.counts["loads refused"] += 1
                return self._restart(chance)
            if step is None:
                assert not any(each.is_certain for each in self._saved), "nothing is found"
                return self._restart(chance)
            saved = [each for each in self._saved if each.step == step]
            assert saved, f"step {step} is none of {[each.step for each in self._saved]}"
            if faults.anywhere(not equal(target, candidate.state)):
                continue
            newest = max((each.step for each in self._saved if each.is_certain), default=0)
            assert step >= newest or is_damaged, f"step {step} is older than {newest}"
            if step < newest:
                self.counts["loads of an older one"] += 1
            # One that failed may be whole, and be found if the newest is damaged.
            self._saved = [each for each in self._saved if each.step <= step or not each.is_certain]
            self._at = step
            return None
        assert not self._saved or (is_damaged and not self._has_another()), "none of the saves is found"
        return self._restart(chance)

    def _has_another(self) -> bool:
        """Whether there is an older one of this structure, which was saved for certain."""
        return any(
            each.is_certain and each.structure == self._structure and os.path.exists(self._path(each.step))
            for each in self._saved[:-1]
            if each.step != self._saved[-1].step
        )

    def _restart(self, chance: Random) -> None:
        """There is nothing to go on from."""
        self.end()
        self.begin(chance)

    def _path(self, step: int) -> str:
        return os.path.join(self.root, f"iter_{step:07d}", ".metadata")

    def _damage(self, chance: Random) -> None:
        """Flip a bit in the newest."""
        if not self._saved or not self._saved[-1].is_certain:
            return
        newest = self._saved[-1]
        path, back = flip(os.path.dirname(self._path(newest.step)), chance)
        self.doing = f"flip in {os.path.basename(path)}"
        self.counts["fault: flipped bit"] += 1
        self._restore(chance, is_damaged=True)
        if any(each is newest for each in self._saved):  # the bit was not read
            back()
        else:
            self._damaged = newest.step

    def _remove_damaged(self) -> None:
        """As people do. A state without the tensor that is damaged would fit it, and be restored."""
        if self._damaged is not None and all(each.step != self._damaged for each in self._saved):
            if dist.get_rank() == 0:
                shutil.rmtree(os.path.dirname(self._path(self._damaged)), ignore_errors=True)
            dist.barrier()
        self._damaged = None
