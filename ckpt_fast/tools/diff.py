# SPDX-License-Identifier: Apache-2.0
"""Two checkpoints compared, in bounded memory, however each of them is divided."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from ckpt_fast.errors import UnsafeCheckpointError
from ckpt_fast.format.names import COMMON_STATE_KEY
from ckpt_fast.pipeline.load.decode import decode_object
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_parts
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.tools import opening
from ckpt_fast.tools.streaming import Progress, Window, WindowBuffer, batches, no_progress, windows_of
from ckpt_fast.tools.values import Distance, first_difference, pairs, same_bits

Kind = Literal["only in A", "only in B", "kind", "shape", "dtype", "values", "object"]

_COMMON = "common state"
# Of one tensor that are compared at once.
_PIECE_NBYTES = 32 << 20


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        name: of the tensor or object.
        kind: what differs. "kind": one is a tensor, the other an object.
        detail: in words.
        elements: how many elements of the tensor differ in value; None where that was not counted. 0 if only
            bits do (-0.0 and 0.0, kinds of NaN).
        max_abs, max_rel: see ``Distance``; None where that was not measured.
    """

    name: str
    kind: Kind
    detail: str
    elements: int | None = None
    max_abs: float | None = None
    max_rel: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, compared.

    Attributes:
        a, b: their paths.
        tensors, objects: how many are in both of them, and were compared.
        nbytes: of the tensors that were compared, in A.
        differences: all of them, in the order of the names.
    """

    a: str
    b: str
    tensors: int
    objects: int
    nbytes: int
    differences: tuple[Difference, ...]

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same: names, dtypes, shapes, every bit of the tensors, equal objects."""
        return not self.differences


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], progress: Progress = no_progress
) -> Comparison:
    """Compare what two checkpoints hold, whatever writer, format and division into shards they have.

    Local. Each is read once, and what has a checksum in a manifest is compared with it. Beside what is
    compared, memory holds two windows of 36 MiB and the tables of contents.

    Args:
        a, b: as of ``inspect``.
        progress: called with the bytes compared so far, and those that there are.

    Raises:
        CheckpointError: as of ``inspect``; also if one of them is damaged.
    """
    with opening.opened(a) as first, opening.opened(b) as second:
        return _Comparing(first, second, progress).run()


class _Comparing:
    def __init__(self, first: OpenCheckpoint, second: OpenCheckpoint, progress: Progress) -> None:
        self._checkpoints = first, second
        self._indexes = first.index, second.index
        self._found: dict[str, Difference] = {}
        self._distances: dict[str, Distance] = {}
        self._progress = progress
        self._objects = 0

    def run(self) -> Comparison:
        a, b = self._indexes
        tensors: list[str] = []
        for name, in_a, in_b in pairs(a.names, b.names):
            if name == COMMON_STATE_KEY:
                continue
            if not (in_a and in_b):
                self._note(name, "only in A" if in_a else "only in B", "")
            elif (a.shape(name) is None) != (b.shape(name) is None):
                self._note(name, "kind", f"{_kind(a, name)} in A, {_kind(b, name)} in B")
            elif a.shape(name) is None:
                self._compare_object(name)
            elif a.shape(name) != b.shape(name):
                self._note(name, "shape", f"{a.tensor_shape(name)} in A, {b.tensor_shape(name)} in B")
            else:
                tensors.append(name)
        self._compare_common()
        nbytes = self._compare_tensors(tensors)
        for name in tensors:
            self._conclude(name)
        return Comparison(
            self._checkpoints[0].name,
            self._checkpoints[1].name,
            tensors=len(tensors),
            objects=self._objects,
            nbytes=nbytes,
            differences=tuple(self._found[name] for name in sorted(self._found)),
        )

    def _note(self, name: str, kind: Kind, detail: str) -> None:
        self._found[name] = Difference(name, kind, detail)

    def _compare_tensors(self, names: list[str]) -> int:
        a, b = self._indexes
        sizes = {name: max(each.tensor(name).dtype.itemsize for each in (a, b)) for name in names}
        total = sum(math.prod(a.tensor_shape(name)) * a.tensor(name).dtype.itemsize for name in names)
        buffers = WindowBuffer(a), WindowBuffer(b)
        done = 0

        def windows() -> Iterator[Window]:
            for name in names:
                yield from windows_of(a.tensor(name), _PIECE_NBYTES, sizes[name])

        with ThreadPoolExecutor(2, "ckpt_fast-diff") as threads:
            for batch in batches(windows(), sizes.__getitem__):
                read = threads.map(lambda buffer, batch=batch: buffer.read(batch), buffers)
                for window, one, other in zip(batch, *read, strict=True):
                    done += one.numel() * one.itemsize
                    if one.dtype == other.dtype and same_bits(one, other):
                        continue
                    self._distances.setdefault(window.name, Distance()).add(one, other)
                self._progress(done, total)
        return total

    def _conclude(self, name: str) -> None:
        dtypes = [str(index.tensor(name).dtype).removeprefix("torch.") for index in self._indexes]
        distance = self._distances.get(name)
        kind: Kind = "values"
        if dtypes[0] != dtypes[1]:
            kind, detail = "dtype", f"{dtypes[0]} in A, {dtypes[1]} in B"
        elif distance is None:
            return
        elif distance.elements:
            count = math.prod(self._indexes[0].tensor_shape(name))
            detail = f"{distance.elements} of {count} elements differ"
        else:
            detail = "equal values of different bits"
        distance = distance or Distance()
        self._found[name] = Difference(
            name, kind, detail, distance.elements, distance.max_abs, distance.max_rel
        )

    def _compare_object(self, name: str) -> None:
        self._objects += 1
        payloads = [load_parts(index, (), [name])[1][name] for index in self._indexes]
        if payloads[0] == payloads[1]:
            return
        try:
            values = [
                decode_object(payload, f"{name} in {index.directory}", verify=True)
                for payload, index in zip(payloads, self._indexes, strict=True)
            ]
        except UnsafeCheckpointError:
            self._note(name, "object", "different bytes, of a class that is not read")
            return
        self._note_object(name, *values)

    def _compare_common(self) -> None:
        """The common state of Megatron-Core, wherever each of the two keeps it."""
        states = [opening.common_state(checkpoint) for checkpoint in self._checkpoints]
        if states[0] is None and states[1] is None:
            return
        if states[0] is None or states[1] is None:
            self._note(_COMMON, "only in A" if states[1] is None else "only in B", "")
            return
        self._objects += 1
        self._note_object(_COMMON, *states)

    def _note_object(self, name: str, one: Any, other: Any) -> None:
        found = first_difference(one, other)
        if found is not None:
            self._note(name, "object", found.strip())


def _kind(index: CheckpointIndex, name: str) -> str:
    return "an object" if index.shape(name) is None else "a tensor"
