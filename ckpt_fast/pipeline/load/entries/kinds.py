# SPDX-License-Identifier: Apache-2.0
"""The entries of a table of contents: tensors in pieces, and objects."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from ckpt_fast.format.types import Extent

T = TypeVar("T")


class Piece(NamedTuple):
    """One saved shard of a tensor: its place in the whole, its extent in every dimension, its item.

    ``transforms`` names the stream transforms (compression) that torch DCP applied to the item.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Extent
    transforms: tuple[str, ...]


class Item(NamedTuple):
    """Where an item is, and the stream transforms that were applied to it."""

    extent: Extent
    transforms: tuple[str, ...]


class SavedTensor(NamedTuple):
    """A whole tensor as stored in the checkpoint.

    The pieces lie inside it and have no element in common. They may leave some out: of a tensor that ranks
    saved without each other, each knows its own pieces.
    """

    fqn: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]


class ByPlace(Generic[T]):
    """Values by the place where something begins in a tensor: looked up by order, which nobody can make slow.

    A dict of places would be as slow as somebody wants who chooses places that have the same hash.

    Args:
        values: with their places and numbers of elements.
    """

    def __init__(self, values: Iterable[tuple[tuple[int, ...], int, T]]) -> None:
        found = sorted(values, key=lambda each: each[:2])
        self._places = [place for place, _, _ in found]
        self._values = [value for _, _, value in found]

    def get(self, place: tuple[int, ...]) -> T | None:
        """The value at a place; of several, that with the most elements: all others are empty, or all are."""
        at = bisect_right(self._places, place) - 1
        return self._values[at] if at >= 0 and self._places[at] == place else None


class Entries(Protocol):
    """A table of contents by name. If a method other than ``shape`` and ``dtype`` raises, it is damaged."""

    @property
    def names(self) -> Collection[str]:
        """Of all tensors and objects."""

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""

    def shape(self, fqn: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None for an object. KeyError: there is neither."""

    def dtype(self, fqn: str) -> torch.dtype | None:
        """The dtype of a tensor; None for an object. KeyError: there is neither."""

    def tensor(self, fqn: str) -> SavedTensor | None:
        """The tensor of this name, if there is one."""

    def object(self, fqn: str) -> Item | None:
        """The item of the object of this name, if there is one."""
