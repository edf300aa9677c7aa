# SPDX-License-Identifier: Apache-2.0
"""The entries of a table of contents: tensors in pieces, and objects."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

import torch

from ckpt_fast.format.types import Extent


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


class Entries(Protocol):
    """A table of contents by name. If a method other than ``shape`` raises, it is damaged."""

    @property
    def names(self) -> Collection[str]:
        """Of all tensors and objects."""

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""

    def shape(self, fqn: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None for an object. KeyError: there is neither."""

    def tensor(self, fqn: str) -> SavedTensor | None:
        """The tensor of this name, if there is one."""

    def object(self, fqn: str) -> Item | None:
        """The item of the object of this name, if there is one."""
