# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other libraries, without a manifest: structure, coverage, and what their archives say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
)
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.format.types import Extent, TensorRequest
from ckpt_fast.pipeline.load.entries.kinds import Piece
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_objects, load_tensors
from ckpt_fast.verification.content import archive_problem
from ckpt_fast.verification.findings import Findings
from ckpt_fast.verification.own import uncovered
from ckpt_fast.verification.report import State

# Members of an archive of torch's that hold elements, which loading compares.
_ELEMENTS = "/data/"
# Items that are checked together; of a batch that fails each is checked alone.
_BATCH = 64


class _Item(NamedTuple):
    """A piece of a tensor of some dtype, or (both None) an object, and where it is."""

    name: str
    piece: Piece | None
    dtype: torch.dtype | None
    extent: Extent

    @property
    def offsets(self) -> tuple[int, ...] | None:
        return self.piece.offsets if self.piece is not None else None


def check_foreign(found: Findings, index: CheckpointIndex, metadata_name: str = METADATA_FILE) -> None:
    """Compare ``.metadata`` with the files and, if all bytes are to be read, each item with its archive.

    Args:
        found: takes the findings.
        index: the table of contents.
        metadata_name: the file that it is from.
    """
    items = list(_items(found, index, metadata_name))
    ends: dict[str, int] = {}
    for item in items:
        path, offset, nbytes = item.extent
        ends[path] = max(ends.get(path, 0), offset + nbytes)
    for path, end in ends.items():
        _check_length(found, path, end)
    present = [item for item in items if _is_present(found, item)]
    if not found.deep:
        for item in present:
            found.item(item.name, item.offsets, item.extent, State.UNREAD)
        return
    damaged = set()
    for item, (state, detail) in _Content(index).states(present):
        found.item(item.name, item.offsets, item.extent, state, detail)
        damaged |= {item.extent.path} if state.is_damage else set()
    for path in ends:
        if path in damaged:
            found.file(path, State.FLIPPED, "has damaged items")
        elif found.state_of(path) is State.UNREAD:
            found.file(path, State.SOUND)


def _check_length(found: Findings, path: str, end: int) -> None:
    nbytes = found.sizes.get(path)
    if nbytes is None:
        found.file(path, State.MISSING, "is missing")
    elif nbytes < end:
        found.file(path, State.TRUNCATED, f"has {nbytes} bytes, and .metadata names items up to {end}")
    else:
        found.file(path, State.UNREAD)


def _is_present(found: Findings, item: _Item) -> bool:
    """Whether all of an item is in its file; if not, that is a finding."""
    nbytes, end = found.sizes.get(item.extent.path), item.extent.offset + item.extent.nbytes
    if nbytes is None:
        found.item(item.name, item.offsets, item.extent, State.MISSING, "its file is missing")
    elif nbytes < end:
        found.item(item.name, item.offsets, item.extent, State.TRUNCATED, f"its file ends at {nbytes}")
    return nbytes is not None and nbytes >= end


def _items(found: Findings, index: CheckpointIndex, metadata_name: str) -> Iterator[_Item]:
    for name in index.names:
        try:
            if index.shape(name) is None:
                yield _Item(name, None, None, index.object_extent(name))
                continue
            tensor = index.tensor(name)
        except CheckpointCorruptError as error:
            found.file(metadata_name, State.FLIPPED, f"is damaged ({error})")
            continue
        lacking = uncovered(tensor)
        if lacking is not None:
            found.item(name, None, Extent("", 0, 0), State.MISSING, lacking)
        for piece in tensor.pieces:
            yield _Item(name, piece, tensor.dtype, piece.item)


class _Content:
    """Reads items, and compares the checksums in their archives.

    Args:
        index: the checkpoint.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index

    def states(self, items: Sequence[_Item]) -> list[tuple[_Item, tuple[State, str]]]:
        """What each item is found to be, file by file."""
        states: dict[int, tuple[State, str]] = {}
        order = sorted(range(len(items)), key=lambda number: items[number].extent)
        tensors = [number for number in order if items[number].piece is not None]
        objects = [number for number in order if items[number].piece is None]

        def load_pieces(batch: Sequence[int]) -> None:
            # One element of each piece: with it all of the piece is read, for its checksum.
            requests = [
                TensorRequest(each.name, torch.empty([1] * len(sizes), dtype=each.dtype), each.piece.offsets)
                for each in (items[number] for number in batch)
                if each.piece is not None and 0 not in (sizes := each.piece.sizes)
            ]
            load_tensors(self._index, requests, verify=True)

        def load_values(batch: Sequence[int]) -> None:
            load_objects(self._index, [items[number].name for number in batch], verify=True)

        self._each(tensors, load_pieces, states)
        self._each(objects, load_values, states)
        for number in tensors:
            # torch reads more of an archive than loading does.
            if states[number][0] is State.SOUND and (problem := self._archive_problem(items[number])):
                states[number] = State.FLIPPED, f"its archive is damaged ({problem})"
        return [(item, states[number]) for number, item in enumerate(items)]

    def _archive_problem(self, item: _Item) -> str | None:
        if item.piece is None or item.piece.transforms:
            return None
        path, offset, nbytes = item.extent
        self._index.files.fetch([path])
        with open(f"{self._index.files.directory}/{path}", "rb") as file:
            # Of an empty piece nothing has been loaded.
            skip = None if 0 in item.piece.sizes else _ELEMENTS
            return archive_problem(file, offset, nbytes, skip=skip)

    def _each(
        self,
        numbers: Sequence[int],
        check: Callable[[Sequence[int]], None],
        states: dict[int, tuple[State, str]],
    ) -> None:
        for start in range(0, len(numbers), _BATCH):
            batch = numbers[start : start + _BATCH]
            try:
                check(batch)
                states.update(dict.fromkeys(batch, (State.SOUND, "")))
                continue
            except CheckpointError:
                pass
            for number in batch:
                states[number] = _state(check, number)


def _state(check: Callable[[Sequence[int]], None], number: int) -> tuple[State, str]:
    try:
        check([number])
    except CheckpointCorruptError as error:
        return State.FLIPPED, str(error)
    except UnsafeCheckpointError as error:
        # Refused only after its checksums were found to be right.
        return State.UNDECODED, str(error)
    except CheckpointNotFoundError as error:
        return State.MISSING, str(error)
    except CheckpointError as error:
        return State.UNCHECKED, str(error)
    return State.SOUND, ""
