# SPDX-License-Identifier: Apache-2.0
"""Entries from torch DCP's metadata, whoever wrote it."""

from __future__ import annotations

import functools
import itertools
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ckpt_fast.format.consistency import Region, UsedBytes, require_apart
from ckpt_fast.format.types import Extent
from ckpt_fast.pipeline.load.entries.kinds import Item, Piece, SavedTensor

LONGEST_FILE = 1 << 62


class PickledEntries:
    """The entries of unpickled metadata; see ``Entries``.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: what the metadata says of items contradicts what it
            says of tensors, or items share bytes of a file.
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self.nbytes = 0
        self._pieces: dict[str, dict[tuple[int, ...], Item]] = defaultdict(dict)
        self._objects: dict[str, Item] = {}
        self._take_items()
        self._require_an_item_for_each_piece()

    @property
    def names(self) -> Collection[str]:
        names: Collection[str] = self._metadata.state_dict_metadata.keys()
        return names

    def shape(self, fqn: str) -> tuple[int, ...] | None:
        entry = self._metadata.state_dict_metadata[fqn]
        return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None

    def dtype(self, fqn: str) -> torch.dtype | None:
        entry = self._metadata.state_dict_metadata[fqn]
        return entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None

    def object(self, fqn: str) -> Item | None:
        return self._objects.get(fqn)

    def tensor(self, fqn: str) -> SavedTensor | None:
        entry = self._metadata.state_dict_metadata.get(fqn)
        return self._assemble(fqn, entry) if isinstance(entry, TensorStorageMetadata) else None

    def _take_items(self) -> None:
        used = UsedBytes()
        for index, info in (self._metadata.storage_data or {}).items():
            item = Item(_extent(info), tuple(getattr(info, "transform_descriptors", None) or ()))
            self.nbytes += item.extent.nbytes
            used.add(*item.extent)
            if isinstance(self._metadata.state_dict_metadata[index.fqn], TensorStorageMetadata):
                self._pieces[index.fqn][tuple(index.offset or ())] = item
            else:
                self._objects[index.fqn] = item
        shared = used.shared()
        if shared is not None:
            names = sorted(
                index.fqn
                for index, info in self._metadata.storage_data.items()
                if info.relative_path == shared[0] and info.offset <= shared[1] < info.offset + info.length
            )
            raise ValueError(f"{' and '.join(names[:2])} share bytes of {shared[0]} at {shared[1]}")

    def _require_an_item_for_each_piece(self) -> None:
        """Includes tensors that are not loaded: a damaged name or location can claim the bytes of another."""
        for fqn, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                if fqn not in self._objects:
                    raise ValueError(f"{fqn} has no item")
            elif len(self._pieces[fqn]) != len(entry.chunks):
                # Sorted, since the hashes of places that somebody has chosen may all be equal.
                places = itertools.groupby(sorted(tuple(chunk.offsets) for chunk in entry.chunks))
                count = sum(1 for _ in places)
                if len(self._pieces[fqn]) != count:
                    raise ValueError(f"{fqn} has {len(self._pieces[fqn])} items for {count} pieces")

    def _assemble(self, fqn: str, entry: TensorStorageMetadata) -> SavedTensor:
        shape, dtype = _whole_numbers(entry.size), entry.properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{fqn} has no dtype")
        items, pieces = self._pieces[fqn], []
        regions = [
            Region(_whole_numbers(chunk.offsets), _whole_numbers(chunk.sizes)) for chunk in entry.chunks
        ]
        if len(regions) > 1:
            regions = list(dict.fromkeys(regions))  # a replicated piece may be there more than once
        for region in regions:
            if not len(region.offsets) == len(region.sizes) == len(shape):
                raise ValueError(f"a piece of {fqn} has another number of dimensions")
            # A whole tensor may be stored without an offset.
            item = items.get(region.offsets) or (items.get(()) if not any(region.offsets) else None)
            if item is None:
                raise ValueError(f"{fqn} has no item for its piece {region}")
            pieces.append(Piece(*region, item.extent, item.transforms))
        try:
            require_apart(shape, regions)
        except ValueError as error:
            raise ValueError(f"{fqn}: {error}") from None
        return SavedTensor(fqn, dtype, shape, pieces)


def _extent(info: Any) -> Extent:
    """An item's location according to the metadata; ValueError if it is not valid in this directory."""
    path, (offset, nbytes) = info.relative_path, _whole_numbers((info.offset, info.length))
    require_inside(path)
    if offset + nbytes > LONGEST_FILE:
        raise ValueError(f"{path} cannot have {nbytes} bytes at {offset}")
    return Extent(path, offset, nbytes)


@functools.lru_cache(maxsize=1024)
def require_inside(path: object) -> None:
    """Check that a path stays inside its checkpoint.

    Raises:
        ValueError: it does not, or is no path.
    """
    if not isinstance(path, str) or os.path.isabs(path) or ".." in path.split("/") or "\0" in path:
        raise ValueError(f"{path!r} is no file of the checkpoint")


def _whole_numbers(values: Iterable[Any]) -> tuple[int, ...]:
    checked = tuple(values)
    for value in checked:
        if type(value) is not int or value < 0:
            raise ValueError(f"{checked} are no sizes")
    return checked
