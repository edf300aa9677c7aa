# SPDX-License-Identifier: Apache-2.0
"""Random overlapping background saves, through the documented API and through Megatron-Core's strategies.

Every save has a unique number, from which its parameters and counters derive.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from ckpt_fast import FastSaveStrategy
from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.save import waves
from tests.crash.campaigns.overlaps import REASONS
from tests.models import Run, Setup, megatron_on_cpu

POLICIES = ("wait", "skip", "queue")
ROOTS, STEPS, DIRECTORIES = 2, 3, 2
SHAPE = (50, 40)


class RunOverlaps:
    """One schedule of one run, whose queue takes the saves of both. Use it as a context manager.

    Args:
        root: directory of all its checkpoints.
        seed: seed of the schedule.
    """

    def __init__(self, root: str, seed: int) -> None:
        self._root = root
        self._random = random.Random(seed)
        self._number = 0
        # For each checkpoint, by root and step: the saves to it that were started.
        self._accepted: dict[tuple[str, int], list[int]] = {}
        self._run = Run(Setup(), save=root, async_save=True, async_strategy="mcore")
        self.counts: Counter[str] = Counter()

    def run(self, saves: int) -> None:
        """Start this many saves; all have ended when this returns."""
        original, generator = waves.write, random.Random(self._random.random())

        def slowly(*arguments: Any) -> Any:
            time.sleep(generator.choice((0, 0.001, 0.02)))
            return original(*arguments)

        waves.write = slowly
        try:
            with self._run:
                self._run.train(1)
                self._run.state.initialize_async_checkpoint_worker()
                while self._number < saves:
                    self._begin()
                    if self._random.random() < 0.3:
                        self._finalize(blocking=self._random.random() < 0.3)
                    if self._random.random() < 0.05:
                        self._settle()
                self._settle()
        finally:
            waves.write = original

    def _begin(self) -> None:
        self._number += 1
        try:
            self._random.choice((self._documented, self._documented, self._megatron_core))()
        except CheckpointError as error:
            self.counts["refused"] += 1
            assert any(reason in f"{error} {error.__cause__}" for reason in REASONS), error

    def _documented(self) -> None:
        number, root, step = self._number, self._place(ROOTS, "run"), 1 + self._random.randrange(STEPS)
        policy = self._random.choice(POLICIES)
        self._run.checkpoint.save = root
        self._run.checkpoint.on_save_in_progress = policy
        self._fill(number, step)
        before = self._queue.handles[-1:]
        self._run.save()
        self._fill(-1, 0)  # training continues
        is_skipped = policy == "skip" and self._queue.handles[-1:] == before
        self._note("skipped" if is_skipped else "begun", root, step, number)

    def _megatron_core(self) -> None:
        number, directory = self._number, self._place(DIRECTORIES, "core")
        os.makedirs(directory, exist_ok=True)
        tensor = torch.full(SHAPE, float(number))
        with megatron_on_cpu():
            request = dist_checkpointing.save(
                self._state(tensor, number), directory, FastSaveStrategy(), async_sharded_save=True
            )
        tensor.fill_(-1)
        self._queue.schedule_async_request(request)
        self._note("begun", directory, 0, number)

    @property
    def _queue(self) -> Any:
        return self._run.state.async_calls_queue

    def _note(self, how: str, place: str, step: int, number: int) -> None:
        self.counts[how] += 1
        if how == "begun":
            self._accepted.setdefault((place, step), []).append(number)

    def _place(self, count: int, kind: str) -> str:
        return os.path.join(self._root, f"{kind}{self._random.randrange(count)}")

    def _fill(self, number: int, step: int) -> None:
        self._run.state.train_state.step = step
        self._run.state.train_state.consumed_train_samples = number
        with torch.no_grad():
            for parameter in self._run.model[0].parameters():
                parameter.fill_(number)

    def _finalize(self, blocking: bool) -> None:
        maybe_finalize_async_save(self._run.state, self._run.checkpoint, blocking=blocking)

    def _settle(self) -> None:
        """Let all saves end, and check that each checkpoint is the last save started to it."""
        self._finalize(blocking=True)
        for (place, step), numbers in self._accepted.items():
            found = self._core_number_in(place) if step == 0 else self._run_number_in(place, step)
            assert found in numbers, f"{place}, step {step}, holds save {found}, begun were {numbers}"
            assert found == numbers[-1], f"{place}, step {step}, holds save {found} of {numbers}"
            self.counts["looked at"] += 1

    def _run_number_in(self, root: str, step: int) -> int:
        self._run.checkpoint.load, self._run.checkpoint.ckpt_step = root, step
        self._run.load()
        position = self._run.state.train_state
        values = {float(v) for each in self._run.model[0].parameters() for v in (each.min(), each.max())}
        assert position.step == step and values == {float(position.consumed_train_samples)}
        return int(position.consumed_train_samples)

    def _core_number_in(self, directory: str) -> int:
        loaded = torch_dist.load(self._state(torch.zeros(SHAPE), -1), directory)
        values = loaded["w"].unique().tolist()
        assert values == [float(loaded["iteration"])]
        return int(values[0])

    @staticmethod
    def _state(tensor: torch.Tensor, number: int) -> dict[str, Any]:
        return {"w": ShardedTensor.from_rank_offsets("w", tensor), "iteration": number}
