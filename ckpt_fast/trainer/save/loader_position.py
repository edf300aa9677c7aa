# SPDX-License-Identifier: Apache-2.0
"""The data loader's position while it is saved with a checkpoint."""

from __future__ import annotations

import os
import secrets
import shutil
from typing import Any

from ckpt_fast.format.manifest import file_record
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.save.objects import object_bytes
from ckpt_fast.ranks.world import note_rank_0
from ckpt_fast.storage import objects, replacement
from ckpt_fast.storage.commit import make_directory
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.trainer.places.paths import get_checkpoint_name, join_paths, write_file

STATE = "dataloader_state_dict"
STATES_OF_STAGES = "dataloader_state_dicts"


def can_save_position(train_iterator: Any) -> bool:
    """Whether the iterator, or each of a list of them, can give its position."""
    iterators = iterators_of(train_iterator)
    return bool(iterators) and all(
        hasattr(getattr(each, "iterable", None), "save_state") for each in iterators
    )


class LoaderPosition:
    """The data loader's position while it is saved with a checkpoint. All methods are local.

    Args:
        train_iterator: see ``maybe_save_dataloader_state``.
        iteration: the iteration of the checkpoint.
        root: where positions are saved; None or "": nowhere.
        groups: process groups. The first ranks of the tensor, pipeline and context groups save.

    Attributes:
        records: what this rank saves, by the name of the file and that of its directory; known once it is
            captured.
    """

    def __init__(self, train_iterator: Any, iteration: int, root: str | None, groups: Any) -> None:
        self.records: list[FileRecord] = []
        self._iterator, self._iteration, self._root = train_iterator, iteration, root
        self._content = b""
        self._beside: str | None = None
        self.is_saved_here = bool(iterators_of(train_iterator) and root) and all(
            rank_in(getattr(groups, name, None)) == 0 for name in ("tp", "pp", "cp")
        )
        self._path = position_file(root, iteration, rank_in(groups.dp)) if root else ""

    def require_known(self) -> None:
        """Raise RuntimeError if there is an iterator that cannot tell its position."""
        if iterators_of(self._iterator) and self._root and not can_save_position(self._iterator):
            raise RuntimeError(
                f"Could not find a save_state in the train dataloader {type(self._iterator).__name__}; give "
                "its iterable a save_state method or unset dataset.dataloader_save"
            )

    def capture(self) -> None:
        """Take the position as it is now; RuntimeError as in ``require_known``, UnsafeCheckpointError if it
        could not be loaded again."""
        self.require_known()
        if not self.is_saved_here:
            return
        note_rank_0(f"saving dataloader checkpoint at iteration {self._iteration} to {self._root}")
        states = [each.iterable.save_state() for each in iterators_of(self._iterator)]
        self._content = _serialise(states)
        name = "/".join(self._path.rsplit("/", 2)[-2:])
        self.records = [file_record(name, self._content)]

    def prepare(self, token: str | None = None) -> None:
        """For one rank: make room.

        Args:
            token: of the directory beside a checkpoint that this save replaces: the position of that one
                stays until ``take_place``. None: what an earlier save of the iteration has left is removed.
        """
        if not self.records:
            return
        directory = os.path.dirname(self._path)
        beside = self._beside_for(token)
        if beside is not None and os.path.isdir(beside):
            return  # positions lie in the checkpoint itself, and take their place along with it
        if beside is None or replacement.begin(directory, token) is None:
            _prepare_directory(directory)
        else:
            self._beside = beside

    def prepare_alone(self) -> str | None:
        """``prepare`` for a save that tells no directory; returns the token for ``write``."""
        directory = os.path.dirname(self._path)
        token = None if object_storage(directory) or not os.path.isdir(directory) else secrets.token_hex(4)
        self.prepare(token)
        return token

    def write(self, token: str | None = None) -> list[FileRecord]:
        """Write what was captured, durably; returns ``records``."""
        if self.records:
            beside = self._beside_for(token)
            is_beside = beside is not None and os.path.isdir(beside)
            path = os.path.join(beside or "", os.path.basename(self._path)) if is_beside else self._path
            write_file(path, self._content)
        return self.records

    def _beside_for(self, token: str | None) -> str | None:
        directory = os.path.dirname(self._path)
        if token is None or object_storage(directory):
            return None
        return replacement.beside(os.path.realpath(directory), token)

    def take_place(self) -> None:
        """For the rank that has prepared: the checkpoint is in its place, and the position goes to its own.

        Raises:
            CheckpointWriteError: it cannot; whoever loads the checkpoint finds it where it is.
        """
        if self._beside is not None:
            directory = os.path.dirname(self._path)
            replacement.exchange(self._beside, directory)
            replacement.sweep(directory)


def iterators_of(train_iterator: Any) -> list[Any]:
    several = isinstance(train_iterator, (list, tuple))
    return [each for each in (train_iterator if several else [train_iterator]) if each is not None]


def rank_in(group: Any) -> int:
    """0 where a program has no such group."""
    return 0 if group is None else int(group.rank())


def position_file(root: str, iteration: int, data_parallel_rank: int) -> str:
    name = f"train_dataloader_dprank{data_parallel_rank:03d}.pt"
    return join_paths(get_checkpoint_name(root, iteration), name)


def _serialise(states: list[Any]) -> bytes:
    content = {STATE: states[0]}
    if len(states) > 1:
        content[STATES_OF_STAGES] = states
    return object_bytes(content, "the position of the data loader")


def _prepare_directory(directory: str) -> None:
    if object_storage(directory):
        objects.delete(directory, recursive=True)
        return
    if os.path.isdir(directory):
        shutil.rmtree(directory)
    replacement.sweep(directory)
    make_directory(directory)
