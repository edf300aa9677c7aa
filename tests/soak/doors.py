# SPDX-License-Identifier: Apache-2.0
"""The doors that save a number: Megatron-Core's strategies, local checkpoints, the pipeline and its queue."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from random import Random

import torch.distributed as dist

from ckpt_fast import compat
from tests.crash.campaigns.doors import DOORS, Door, Queued
from tests.soak import faults
from tests.soak.faults import Fault, flip
from tests.soak.subject import Subject

_NAMES = ("pipeline", "pipeline-queue", "dcp-queue", "megatron-core", "megatron-core-async")
# Files that Megatron-Core reads itself, and writes before it asks a strategy.
_OF_MEGATRON_CORE = ("metadata.json", "common.pt")
_LOCAL = ("local", "local-async")


class Doors(Subject):
    """A directory for each door, which is saved to again and again, with ever greater numbers.

    Of each it knows which numbers it may hold; None stands for no checkpoint.
    """

    def __init__(self, root: str, counts: Counter[str]) -> None:
        super().__init__(root, counts)
        self._doors: dict[str, Door] = {}
        self._number = 0

    def begin(self, chance: Random) -> None:
        """Open all doors."""
        self.empty()
        names = _NAMES + (_LOCAL if compat.HAVE_RESIL else ())
        self._doors = {name: DOORS[name]() for name in names}
        self._held: dict[str, list[float | None]] = {name: [None] for name in names}

    def end(self) -> None:
        """Drop what is in flight."""
        for door in self._doors.values():
            with contextlib.suppress(*faults.ERRORS):
                door.give_up()

    def step(self, chance: Random) -> None:
        """Save, load or damage, through one of them."""
        name = chance.choice(sorted(self._doors))
        how = chance.random()
        if how < 0.6:
            self._save(chance, name)
        elif how < 0.9:
            self._load(name)
        else:
            self._damage(chance, name)

    def _save(self, chance: Random, name: str) -> None:
        door = self._doors[name]
        self.doing = f"save through {name}"
        self._number += 1
        door.polls = chance.random() < 0.5
        number, fault = float(self._number), self._fault(chance, name)
        if self.attempt(chance, fault, lambda: door.save(self._place(name), number)):
            self._held[name] = [number]
        else:
            door.give_up()
            # Megatron-Core's seal is taken away before anything is written.
            lost: list[float | None] = [None] if name.startswith("megatron-core") else []
            self._held[name] = [*lost, *self._held[name], number]
        self.counts["saves"] += 1

    def _remove(self, name: str) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._place(name), ignore_errors=True)
            os.makedirs(self._place(name))
        dist.barrier()
        self._held[name] = [None]

    def _fault(self, chance: Random, name: str) -> Fault | None:
        if chance.random() > 0.3:
            return None
        found: list[Fault] = [faults.no_room]
        if not name.startswith("megatron-core"):  # Megatron-Core writes files as well, each rank on its own
            found += [faults.failing_call, faults.full_disk]
        if isinstance(self._doors[name], Queued) and name != "local":
            found.append(faults.deadline)
        if dist.get_world_size() == 1:
            found += [faults.interruption] * 2
        return chance.choice(found)

    def _load(self, name: str) -> None:
        door, held = self._doors[name], self._held[name]
        self.doing = f"load through {name}"
        self.counts["loads"] += 1
        if held == [None] or (None in held and not door.is_published(self._place(name))):
            return
        try:
            found = door.load(self._place(name))
        except faults.ERRORS as error:
            # A save that failed has lost the common state of the one before.
            if len(held) == 1 or not name.startswith("megatron-core") or not faults.is_refusal(error):
                raise
            self.counts["loads refused"] += 1
            self._remove(name)
            return
        assert found in held, f"{name} holds {found}, not one of {held}"
        self._held[name] = [found]

    def _damage(self, chance: Random, name: str) -> None:
        """Flip a bit, which a load refuses or need not read, and flip it back."""
        door, held = self._doors[name], self._held[name]
        if len(held) > 1 or held[0] is None:
            return
        path, back = flip(self._place(name), chance, *_OF_MEGATRON_CORE)
        self.doing = f"flip in {os.path.basename(path)} of {name}"
        self.counts["fault: flipped bit"] += 1
        try:
            found = door.load(self._place(name))
        except faults.ERRORS as error:
            if not faults.is_refusal(error):
                raise
            self.counts["loads refused"] += 1
        else:
            assert found == held[0], f"a flipped bit in {path}: {found} is loaded, not {held[0]}"
            self.counts["loads"] += 1
        back()

    def _place(self, name: str) -> str:
        return os.path.join(self.root, name)
