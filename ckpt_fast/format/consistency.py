# SPDX-License-Identifier: Apache-2.0
"""Consistency checks on a table of contents: pieces outside their tensor or overlapping, bytes used twice."""

from __future__ import annotations

import itertools
import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

# To name the region that is missing is worth no longer search.
_MOST_SUBTRACTIONS = 4096


class Placed(Protocol):
    """Anything that lies somewhere in a tensor: a Region, torch DCP's ChunkStorageMetadata."""

    @property
    def offsets(self) -> Sequence[int]: ...

    @property
    def sizes(self) -> Sequence[int]: ...


class Region(NamedTuple):
    """Part of a tensor: where it begins and its extent, in every dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.sizes} at {self.offsets}"


def require_described(metadata: Metadata) -> None:
    """Require the fields of tensors that torch's planners use; a pickle may set others, or none.

    Raises:
        ValueError: naming the tensor.
    """
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{fqn} is described by a {type(entry).__name__}")
        try:
            dimensions = len(entry.size)
            is_whole = isinstance(entry.properties.dtype, torch.dtype) and all(
                len(chunk.offsets) == len(chunk.sizes) == dimensions for chunk in entry.chunks
            )
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{fqn} is not described: {error}") from error
        if not is_whole:
            raise ValueError(f"{fqn} has no dtype, or a piece of another number of dimensions")


def tile(shape: Sequence[int], regions: Sequence[Placed]) -> bool:
    """Whether the regions cover every element of a tensor exactly once.

    Boxes add up to one box everywhere if and only if their corners do, counted with alternating signs.
    """
    divided = [
        dimension
        for dimension, size in enumerate(shape)
        if any(region.sizes[dimension] != size or region.offsets[dimension] for region in regions)
    ]
    corners: dict[tuple[int, ...], int] = defaultdict(int)
    signed_ends = [(ends, (-1) ** sum(ends)) for ends in itertools.product((0, 1), repeat=len(divided))]
    for ends, sign in signed_ends:
        corners[tuple([end * shape[d] for d, end in zip(divided, ends, strict=True)])] -= sign
        for region in regions:
            offsets, sizes = region.offsets, region.sizes
            corners[tuple([offsets[d] + e * sizes[d] for d, e in zip(divided, ends, strict=True)])] += sign
    return not any(corners.values())


def require_apart(shape: Sequence[int], regions: Sequence[Region]) -> bool:
    """Check that each region lies inside a tensor and has no element that another has.

    Args:
        shape: of the tensor; the regions have as many dimensions.
        regions: no two are equal.

    Returns:
        Whether they leave out nothing of the tensor.

    Raises:
        ValueError: naming the region that is outside, or two that overlap.
    """
    if _divided_once(shape, regions):
        return True
    for region in regions:
        if not all(0 <= begin <= limit - size for begin, size, limit in zip(*region, shape, strict=True)):
            raise ValueError(f"a piece of shape {region} is not inside {tuple(shape)}")
    filled = [region for region in regions if 0 not in region.sizes]
    whole = math.prod(shape)
    covered = sum(region.numel for region in filled)
    if covered == whole and (len(filled) < 2 or tile(shape, filled)):
        return True
    for one, other in _overlapping(filled):
        raise ValueError(f"the pieces of shape {one} and {other} overlap")
    return False


def _divided_once(shape: Sequence[int], regions: Sequence[Region]) -> bool:
    """Whether the regions are the whole tensor, or its parts along one dimension: nearly all are."""
    if not regions:
        return False
    first, end = min(regions), 0
    divided = next((d for d, size in enumerate(shape) if first.sizes[d] != size), 0)
    before, after = tuple(shape[:divided]), tuple(shape[divided + 1 :])
    for offsets, sizes in sorted(regions):
        if (
            min(offsets, default=0) < 0
            or sum(offsets) != end
            or sizes[:divided] != before
            or sizes[divided + 1 :] != after
        ):
            return False
        if shape:
            if offsets[divided] != end:
                return False
            end += sizes[divided]
    return end == shape[divided] if shape else len(regions) == 1


def _overlapping(regions: list[Region]) -> Iterable[tuple[Region, Region]]:
    """Pairs of regions with elements in common, in no order; all have elements."""
    if len(regions) < 2:
        return
    dimensions = range(len(regions[0].offsets))
    if not dimensions:
        yield regions[0], regions[1]
        return
    # Along the dimension that is divided most, few regions are passed at the same time.
    swept = max(dimensions, key=lambda d: len({region.offsets[d] for region in regions}))
    passed: list[Region] = []
    for region in sorted(regions, key=lambda region: region.offsets[swept]):
        begin = region.offsets[swept]
        passed = [other for other in passed if other.offsets[swept] + other.sizes[swept] > begin]
        yield from ((other, region) for other in passed if _intersection(other, region) is not None)
        passed.append(region)


def _intersection(one: Region, other: Region) -> Region | None:
    low = tuple(map(max, one.offsets, other.offsets))
    high = (min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True))
    sizes = tuple(end - begin for begin, end in zip(low, high, strict=True))
    return Region(low, sizes) if all(size > 0 for size in sizes) else None


def missing_region(shape: Sequence[int], regions: Sequence[Region]) -> Region | None:
    """A part of a tensor that is in no region; None if there is none, or it is too hard to find."""
    left = [Region((0,) * len(shape), tuple(shape))]
    subtractions = 0
    for region in regions:
        subtractions += len(left)
        if subtractions > _MOST_SUBTRACTIONS:
            return None
        left = [part for each in left for part in _without(each, region)]
    return next((part for part in left if part.numel), None)


def missing_message(fqn: str, offsets: Sequence[int], sizes: Sequence[int], found: Sequence[Region]) -> str:
    """Text of the error for a region of a tensor that the checkpoint does not have all of.

    Args:
        fqn: the tensor.
        offsets, sizes: the region.
        found: what there is of it, relative to ``offsets``, without common elements.
    """
    missing = missing_region(sizes, found)
    where = ""
    if missing is not None:
        begin = tuple(a + b for a, b in zip(missing.offsets, offsets, strict=True))
        where = f", and none of {Region(begin, missing.sizes)}"
    covered, wanted = sum(region.numel for region in found), math.prod(sizes)
    return (
        f"the checkpoint has only {covered} of the {wanted} elements of {fqn} at {tuple(offsets)}{where}: a "
        "piece is missing from .metadata. Load an earlier iteration."
    )


def _without(region: Region, other: Region) -> list[Region]:
    """The parts of a region that are not in another."""
    common = _intersection(region, other)
    if common is None:
        return [region]
    parts = []
    offsets, sizes = list(region.offsets), list(region.sizes)
    for dimension, (low, size) in enumerate(zip(*common, strict=True)):
        begin, end = offsets[dimension], offsets[dimension] + sizes[dimension]
        for first, last in ((begin, low), (low + size, end)):
            if first < last:
                offsets[dimension], sizes[dimension] = first, last - first
                parts.append(Region(tuple(offsets), tuple(sizes)))
        offsets[dimension], sizes[dimension] = low, size
    return parts


class UsedBytes:
    """The byte ranges that items occupy in a checkpoint's files."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[array[int], array[int]]] = {}

    def add(self, path: str, offset: int, nbytes: int) -> None:
        """An item's range."""
        columns = self._files.get(path)
        if columns is None:
            columns = self._files[path] = (array("q"), array("q"))
        columns[0].append(offset)
        columns[1].append(nbytes)

    def shared(self) -> tuple[str, int] | None:
        """File and offset of a range that begins in another one, if any does."""
        for path, columns in self._files.items():
            offsets, lengths = (torch.tensor(column, dtype=torch.int64) for column in columns)
            offsets, lengths = offsets[lengths > 0], lengths[lengths > 0]
            offsets, order = offsets.sort()
            begins_inside = offsets[:-1] + lengths[order][:-1] > offsets[1:]
            if begins_inside.any():
                return path, int(offsets[1:][begins_inside][0])
        return None
