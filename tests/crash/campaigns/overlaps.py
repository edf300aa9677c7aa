# SPDX-License-Identifier: Apache-2.0
"""Random overlapping saves through several doors to a few directories, and the invariants they must keep.

Every save has a unique number, from which all its tensors and its ``step`` derive. So a checkpoint shows
which save it is from, and that it is from no other.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import FastStorageReader, FastStorageWriter
from ckpt_fast.doors.dcp.direct import save as dcp_save
from ckpt_fast.errors import CheckpointError
from ckpt_fast.jobs.background import SaveHandle, SaveQueue
from ckpt_fast.pipeline.save import waves
from ckpt_fast.pipeline.save.parts import SaveOptions

DIRECTORIES = 4
SHARED = {"one": 1, "true": True, "none": None, "dtype": "bf16", "empty": ()}
# Errors that a save may raise if it is refused or abandoned.
REASONS = ("is not over: this one would destroy it", "was cancelled", "was saved already")


def state_of(number: int, generator: random.Random) -> dict[str, Any]:
    """Return a state dict of this number; saves share its small values, and its tensors share storage."""
    shapes = [
        tuple(generator.randint(1, 40) for _ in range(generator.randint(1, 3)))
        for _ in range(generator.randint(1, 5))
    ]
    tensors = {f"w{i}": torch.full(shape, float(number)) for i, shape in enumerate(shapes)}
    first = tensors["w0"]
    return {
        **tensors,
        "same": first,
        "part": first[:1],
        "bf16": first.bfloat16().t() if first.dim() == 2 else first.bfloat16(),
        "step": number,
        **SHARED,
        "nested": {"step": number, "list": [number, first, "bf16", True], **SHARED},
    }


def scramble(state: dict[str, Any]) -> None:
    """Change the state, as continued training does."""
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.fill_(-1)
    state["step"] = -1
    state["nested"]["list"].clear()
    state["nested"].clear()


def number_in(directory: str) -> int:
    """Return which save the checkpoint is from, checking that it is complete and from no other."""
    reader = FastStorageReader(directory)
    state: dict[str, Any] = {}
    metadata = reader.read_metadata()
    for fqn, entry in metadata.state_dict_metadata.items():
        tensor = hasattr(entry, "size")
        state[fqn] = torch.zeros(entry.size, dtype=entry.properties.dtype) if tensor else None
    dcp.load(state, storage_reader=FastStorageReader(directory))
    number = state["step"]
    for fqn, value in state.items():
        if isinstance(value, torch.Tensor):
            expected = torch.full((1,), float(number)).to(value.dtype)
            assert bool((value == expected).all()), f"{fqn} of save {number}: {value.unique().tolist()}"
    assert state["nested.step"] == number and state["one"] == 1 and state["true"] is True
    return int(number)


class Overlaps:
    """One schedule. All its saves are started by this thread, or by threads that it starts."""

    def __init__(self, root: str, seed: int) -> None:
        self._root = root
        self._random = random.Random(seed)
        self._number = 0
        self._lock = threading.Lock()
        # For each directory: the saves it may hold; and the saves still to be awaited, in any order.
        self._published: dict[str, set[int]] = {}
        self._awaited: list[tuple[str, int, Callable[[], object]]] = []
        self._threads: list[threading.Thread] = []
        self._queue = SaveQueue()
        self._writer = FastStorageWriter(os.path.join(root, "0"))
        self.counts: Counter[str] = Counter()

    def run(self, saves: int) -> None:
        """Start this many saves; all have ended when this returns."""
        original, generator = waves.write, random.Random(self._random.random())

        def slowly(*arguments: Any) -> Any:
            time.sleep(generator.choice((0, 0.001, 0.02)))
            return original(*arguments)

        waves.write = slowly
        try:
            while self._number < saves:
                self._begin()
                if self._random.random() < 0.4:
                    self._await_one()
                if self._random.random() < 0.05:
                    self._settle()
            self._settle()
        finally:
            waves.write = original

    def _begin(self) -> None:
        self._number += 1
        number, directory = self._number, os.path.join(self._root, str(self._random.randrange(DIRECTORIES)))
        state = state_of(number, self._random)
        how = self._random.choice((self._in_torchs_thread, self._in_a_thread, self._staged, self._queued))
        try:
            how(state, directory, number)
        except (CheckpointError, CheckpointException) as error:
            self._refused(error)
        scramble(state)

    def _in_torchs_thread(self, state: dict[str, Any], directory: str, number: int) -> None:
        writer = self._writer if self._random.random() < 0.5 else FastStorageWriter(directory)
        future: Any = dcp.async_save(state, checkpoint_id=directory, storage_writer=writer)
        self._awaited.append((directory, number, future.result))

    def _in_a_thread(self, state: dict[str, Any], directory: str, number: int) -> None:
        copied = FastStorageWriter(directory).stage(state)

        def save() -> None:
            try:
                dcp.save(copied, storage_writer=FastStorageWriter(directory), no_dist=True)
            except (CheckpointError, CheckpointException) as error:
                self._refused(error)
            else:
                self._is_published(directory, number)

        thread = threading.Thread(target=save)
        thread.start()
        self._threads.append(thread)

    def _staged(self, state: dict[str, Any], directory: str, number: int) -> None:
        """Start a save whose handle is finalized in any order, abandoned or dropped."""
        handle = SaveHandle(dcp_save.start_save(state, directory, SaveOptions(snapshot=True)))
        fate = self._random.choice(("finalize", "finalize", "drop", "abandon", "cancel"))
        if fate == "drop":
            self.counts["dropped"] += 1
            return
        handle.start()
        if fate == "abandon":
            handle.abandon()
            self.counts["abandoned"] += 1
            return
        if fate == "cancel":
            handle.cancel()
        self._awaited.append((directory, number, handle.finalize))

    def _queued(self, state: dict[str, Any], directory: str, number: int) -> None:
        handle = SaveHandle(dcp_save.start_save(state, directory, SaveOptions(snapshot=True)))
        handle.add_finalize_fn(lambda: self._is_published(directory, number))
        self._queue.schedule_async_request(handle)
        if self._random.random() < 0.5:
            self._queue.maybe_finalize_async_calls(blocking=self._random.random() < 0.5)

    def _await_one(self) -> None:
        if self._awaited:
            self._await(self._random.randrange(len(self._awaited)))

    def _await(self, position: int) -> None:
        directory, number, wait = self._awaited.pop(position)
        try:
            wait()
        except (CheckpointError, CheckpointException) as error:
            self._refused(error)
        else:
            self._is_published(directory, number)

    def _settle(self) -> None:
        """Let all saves end, and check what is on disk."""
        # Saves in threads wait for saves that only this thread can end.
        self._queue.maybe_finalize_async_calls(blocking=True)
        self._random.shuffle(self._awaited)
        self._awaited.sort(key=lambda entry: getattr(entry[2], "__name__", "") != "finalize")
        while self._awaited:
            self._await(0)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._look()

    def _is_published(self, directory: str, number: int) -> None:
        with self._lock:
            self.counts["published"] += 1
            self._published.setdefault(directory, set()).add(number)

    def _refused(self, error: BaseException) -> None:
        text = f"{error} {error.__cause__}"
        with self._lock:
            self.counts["refused"] += 1
        assert any(reason in text for reason in REASONS), text

    def _look(self) -> None:
        for directory, numbers in self._published.items():
            if not os.path.exists(os.path.join(directory, ".metadata")):
                # A later abandoned save has ended it.
                self.counts["ended"] += 1
                continue
            found = number_in(directory)
            assert found in numbers, f"{directory} holds save {found}, reported were {sorted(numbers)}"
            self.counts["looked at"] += 1
        self._published.clear()
