# SPDX-License-Identifier: Apache-2.0
"""Saves in pairs: with a context that is kept between saves, and, at the same moment, with a new one.

With one kept context a save collects what it must, with another everything. All must have the same content.
``mutations`` has what may happen to a run between two pairs.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from ckpt_fast import native
from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.errors import CheckpointError
from ckpt_fast.trainer.save.collect import Collection
from tests.manifests import manifest_lies
from tests.models import Run, identical


class Twins:
    """A run's pairs of saves below ``root``.

    Attributes:
        context: the one that is kept where the structure is assumed to be constant.
        collected_context: the one that is kept where it is not.
        saves: how many pairs there are.
    """

    def __init__(self, run: Run, root: str) -> None:
        self.run = run
        self.root = root
        self.context: dict[str, Any] = {}
        self.collected_context: dict[str, Any] = {}
        self.saves = 0

    def save(self, in_background: bool = False, meanwhile: Callable[[], Any] = lambda: None) -> bool:
        """Save a pair and compare the two.

        Args:
            in_background: save so with the kept context; nothing is written before ``meanwhile`` is over.
            meanwhile: what training does then.

        Returns:
            Whether only objects were collected on this rank.
        """
        self.saves += 1
        self._save("new", {}, ckpt_assume_constant_structure=False, async_save=False)
        collected = {"ckpt_assume_constant_structure": False, "async_save": False}
        self._save("collected", self.collected_context, **collected)
        with everything_counted() as count:
            if in_background:
                self._save_in_background(meanwhile)
            else:
                self._save("kept", self.context, ckpt_assume_constant_structure=True, async_save=False)
        dist.barrier()
        if dist.get_rank() == 0:
            assert differing(self.directory("new"), self.directory("kept")) == []
            assert differing(self.directory("new"), self.directory("collected")) == []
            for twin in ("kept", "collected"):
                assert manifest_lies(Path(self.directory(twin))) == []
        dist.barrier()
        return count == []

    def start(self, stack: contextlib.ExitStack) -> tuple[str, str]:
        """Start the one of a pair in the background, writing nothing before ``stack`` is left.

        Returns:
            The two directories.
        """
        self.saves += 1
        self._save("new", {}, ckpt_assume_constant_structure=False, async_save=False)
        stack.enter_context(writing_held())
        self._start()
        return self.directory("new"), self.directory("kept")

    def fail(self) -> str:
        """Save with the kept context alone; return the error."""
        self.saves += 1
        try:
            self._save("kept", self.context, ckpt_assume_constant_structure=True, async_save=False)
        except (CheckpointError, KeyboardInterrupt) as error:
            return str(error)
        return "no error"

    def directory(self, twin: str) -> str:
        """Return the directory of one of the last pair: "new" or "kept"."""
        return os.path.join(self._root(twin), f"iter_{self.run.state.train_state.step:07d}")

    def _root(self, twin: str) -> str:
        return os.path.join(self.root, f"{twin}_{self.saves}")

    def _save(self, twin: str, context: dict[str, Any], **config: Any) -> None:
        self.run.checkpoint.save = self._root(twin)
        for name, value in config.items():
            setattr(self.run.checkpoint, name, value)
        self.run.save(checkpointing_context=context)

    def _start(self) -> None:
        self.run.checkpoint.save, self.run.checkpoint.async_save = self._root("kept"), True
        self.run.state.initialize_async_checkpoint_worker()
        self._save("kept", self.context, ckpt_assume_constant_structure=True, async_save=True)

    def _save_in_background(self, meanwhile: Callable[[], Any]) -> None:
        position = vars(self.run.state.train_state).copy()
        with writing_held() as go_on:
            self._start()
            meanwhile()
            go_on.set()
            maybe_finalize_async_save(self.run.state, self.run.checkpoint, blocking=True)
        vars(self.run.state.train_state).update(position)


@contextlib.contextmanager
def everything_counted() -> Iterator[list[Collection]]:
    """Note who collects everything."""
    seen: list[Collection] = []
    original = Collection.everything

    def everything(self: Collection) -> dict[str, Any]:
        seen.append(self)
        return original(self)

    Collection.everything = everything  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Collection.everything = original  # type: ignore[method-assign]


@contextlib.contextmanager
def writing_held() -> Iterator[threading.Event]:
    """Let saves in the background that use a kept context write no file before the event is set."""
    go_on, engine = threading.Event(), native.engine()
    original = engine.write_files

    def write_files(paths: list[str], *args: Any, **options: Any) -> Any:
        if any("/kept_" in path for path in paths):
            assert go_on.wait(60)
        return original(paths, *args, **options)

    engine.write_files = write_files
    try:
        yield go_on
    finally:
        go_on.set()
        engine.write_files = original


def differing(one: str, other: str) -> list[str]:
    """Return the names of what two checkpoints do not have in common, read without any code of ours."""
    first, second = content(one), content(other)
    return sorted(
        str(name)
        for name in first.keys() | second.keys()
        if not (name in first and name in second and identical(first[name], second[name]))
    )


def content(directory: str) -> dict[Any, Any]:
    """Return all that a checkpoint holds, by name and place."""
    metadata = FileSystemReader(directory).read_metadata()
    found: dict[Any, Any] = {"common": torch.load(os.path.join(directory, "common.pt"), weights_only=False)}
    for index, place in metadata.storage_data.items():
        with open(os.path.join(directory, place.relative_path), "rb") as file:
            file.seek(place.offset)
            item = io.BytesIO(file.read(place.length))
        found[index.fqn, tuple(index.offset or ())] = torch.load(item, weights_only=False)
    for name, entry in metadata.state_dict_metadata.items():
        chunks = sorted((tuple(c.offsets), tuple(c.sizes)) for c in getattr(entry, "chunks", []))
        found[name] = [type(entry).__name__, list(getattr(entry, "size", ())), chunks]
    return found
