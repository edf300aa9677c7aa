# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is, who wrote it, and what is in it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.names import COMMON_STATE_KEY
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.tools import opening
from ckpt_fast.tools.streaming import Progress, WindowBuffer, batches, no_progress, windows_of

# Elements that are looked at together, in float64.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TensorEntry:
    """A saved tensor.

    Attributes:
        name: in the checkpoint.
        dtype: as torch calls it ("bfloat16").
        shape: of the whole tensor.
        nbytes: of its elements.
        shards: pieces that it was saved in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shards: int


@dataclass(frozen=True)
class ObjectEntry:
    """A saved object: its name, and the bytes that it takes up in the files."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What is known of a checkpoint from its small files; no data file is read.

    Attributes:
        path: the checkpoint.
        format: "torch_dist" (Megatron-Core), "fsdp_dtensor", "dcp" (torch DCP) or "local" (the state of one
            rank, on its node).
        iteration: the training step, as notes or name of the checkpoint say; None if they do not.
        writer: "ckpt_fast", or "another library".
        versions: what wrote it, by name, as far as that is noted.
        layout: how the bytes are laid out, in a few words.
        save_id: of the save; None if that has none.
        tensors, objects: in the order of their names. Of a local checkpoint, the tensors are numbered.
    """

    path: str
    format: str
    iteration: int | None
    writer: str
    versions: dict[str, str]
    layout: str
    save_id: str | None
    tensors: tuple[TensorEntry, ...]
    objects: tuple[ObjectEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements of all tensors, and of all objects."""
        return sum(each.nbytes for each in self.tensors) + sum(each.nbytes for each in self.objects)


@dataclass(frozen=True)
class Statistics:
    """What the elements of a tensor are like. Of complex ones, their magnitudes.

    Attributes:
        count: elements.
        minimum, maximum, mean, std: of the finite ones, in float64; NaN if there are none. ``std`` divides by
            their number.
        zeros, nans, infinities: how many there are.
    """

    count: int
    minimum: float
    maximum: float
    mean: float
    std: float
    zeros: int
    nans: int
    infinities: int


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """What a checkpoint is and holds. Local; reads its small files, runs no code of it.

    Args:
        path: a checkpoint of ckpt_fast, Megatron-Core (torch_dist), torch DCP, fsdp_dtensor, or a local one;
            or a directory of checkpoints, of which the selected one is taken. ``msc://...`` works as well.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointCorruptError: its ``.metadata`` is damaged.
        UnsafeCheckpointError: its ``.metadata`` names more than torch DCP's data classes.
        CheckpointError: it cannot be read.
    """
    with opening.opened(path) as checkpoint:
        return inspect_opened(checkpoint)


def inspect_opened(checkpoint: OpenCheckpoint) -> Inspection:
    """``inspect`` of a checkpoint that is open."""
    index = checkpoint.index
    tensors, objects = [], []
    for name in sorted(index.names):
        if index.shape(name) is None:
            objects.append(ObjectEntry(name, index.object_extent(name).nbytes))
            continue
        saved = index.tensor(name)
        dtype = str(saved.dtype).removeprefix("torch.")
        nbytes = math.prod(saved.shape) * saved.dtype.itemsize
        tensors.append(TensorEntry(name, dtype, tuple(saved.shape), nbytes, len(saved.pieces)))
    writer, versions, layout = _origin(checkpoint)
    return Inspection(
        path=checkpoint.name,
        format=opening.format_of(checkpoint),
        iteration=opening.iteration_of(checkpoint),
        writer=writer,
        versions=versions,
        layout=layout,
        save_id=checkpoint.manifest.save_id if checkpoint.manifest is not None else None,
        tensors=tuple(tensors),
        objects=tuple(objects),
    )


def statistics(path: str | os.PathLike[str], name: str, progress: Progress = no_progress) -> Statistics:
    """What the elements of one tensor are like. Local; reads it once, in bounded memory.

    Args:
        path: as of ``inspect``.
        name: of the tensor.
        progress: called with the bytes read so far, and with those of the tensor.

    Raises:
        CheckpointMismatchError: there is no such tensor.
        CheckpointError: as of ``inspect``; what is read does not have its checksum.
    """
    with opening.opened(path) as checkpoint:
        index = checkpoint.index
        if name in index.names and index.shape(name) is None:
            raise CheckpointMismatchError(f"{name} in {checkpoint.name} is an object, not a tensor")
        saved = index.tensor(name)
        itemsize, total = saved.dtype.itemsize, math.prod(saved.shape) * saved.dtype.itemsize
        buffer, tally, done = WindowBuffer(index), _Tally(), 0
        for batch in batches(windows_of(saved, _CHUNK * 32), lambda _: itemsize):
            for tensor in buffer.read(batch):
                elements = tensor.flatten()
                for start in range(0, len(elements), _CHUNK):
                    tally.add(elements[start : start + _CHUNK])
                done += len(elements) * itemsize
                progress(done, total)
        return tally.result()


class _Tally:
    def __init__(self) -> None:
        self._count = self._finite = self._zeros = self._nans = self._infinities = 0
        self._minimum, self._maximum = math.inf, -math.inf
        self._mean = self._squares = 0.0

    def add(self, elements: torch.Tensor) -> None:
        values = (elements.abs() if elements.is_complex() else elements).to(torch.float64)
        finite = values[torch.isfinite(values)]
        self._count += len(values)
        self._zeros += int((values == 0).sum())
        self._nans += int(torch.isnan(values).sum())
        self._infinities += int(torch.isinf(values).sum())
        if not len(finite):
            return
        self._minimum = min(self._minimum, float(finite.min()))
        self._maximum = max(self._maximum, float(finite.max()))
        # Means and sums of squares of two parts, put together without cancellation.
        mean = float(finite.mean())
        squares = float(((finite - mean) ** 2).sum())
        both, apart = self._finite + len(finite), mean - self._mean
        self._squares += squares + apart**2 * self._finite * len(finite) / both
        self._mean += apart * len(finite) / both
        self._finite = both

    def result(self) -> Statistics:
        is_empty = not self._finite
        return Statistics(
            count=self._count,
            minimum=math.nan if is_empty else self._minimum,
            maximum=math.nan if is_empty else self._maximum,
            mean=math.nan if is_empty else self._mean,
            std=math.nan if is_empty else math.sqrt(self._squares / self._finite),
            zeros=self._zeros,
            nans=self._nans,
            infinities=self._infinities,
        )


def _origin(checkpoint: OpenCheckpoint) -> tuple[str, dict[str, str], str]:
    """Who wrote it, with which versions, and its layout."""
    manifest, seal = checkpoint.manifest, opening.seal_of(checkpoint)
    versions: dict[str, str] = {}
    if seal:
        versions["torch_dist"] = str(seal.get("sharded_backend_version", "?"))
    if not checkpoint.is_own:
        noted = getattr(checkpoint.index.metadata, "version", None)
        if noted:
            versions["torch DCP metadata"] = str(noted)
        layout = "archives of torch.save"
        if COMMON_STATE_KEY in checkpoint.index.names:
            layout += ", common state in a data file"
        return "another library", versions, layout
    if manifest is None:
        return "ckpt_fast", versions, "layout 1, without a manifest"
    written_by = manifest.notes.get("written_by")
    if isinstance(written_by, dict):
        versions = {**{str(key): str(value) for key, value in written_by.items()}, **versions}
    table = "manifest and table" if manifest.encoded_table else "manifest"
    return "ckpt_fast", versions, f"layout 1, {table}, a checksum per {manifest.block_nbytes >> 10} KiB"
