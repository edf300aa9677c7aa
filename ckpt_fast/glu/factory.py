# SPDX-License-Identifier: Apache-2.0
"""fc1 rows that are interleaved in memory and contiguous in the checkpoint.

Megatron-Core's optimizers describe master weights and moments with the model's own entries, put another
tensor and key into them, and so inherit whatever an entry does to its rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu.rows import contiguous_view, permute_rows, require_pairs
from ckpt_fast.pipeline.save.plan import is_plain

Build = Callable[[str, Any, Any, Any], Any]


@dataclass
class RowShard(compat.ShardedTensor):  # type: ignore[misc]
    """A ShardedTensor whose rows lie apart in memory; ``data`` is a stand-in without memory.

    Attributes:
        rows: the elements, in row-major order of the local shape.
    """

    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def without_data(self) -> Any:
        """Megatron-Core sends this between ranks."""
        plain = {each.name: getattr(self, each.name) for each in dataclasses.fields(compat.ShardedTensor)}
        return compat.ShardedTensor(**{**plain, "data": None})


@dataclass
class InterleavedFactory(compat.ShardedTensorFactory):  # type: ignore[misc]
    """A ShardedTensorFactory for rows that are interleaved in its data, and contiguous in the checkpoint.

    To Megatron-Core it is a factory that copies: it builds from a reordered copy, and merges into one. Our
    pipeline takes ``in_place`` instead.

    Attributes:
        interleave_size: k.
        build_contiguous: builds the pieces of rows that are in the checkpoint's order; None where merging
            them does more than to join them, so that it cannot be left out.
    """

    interleave_size: int = 1
    build_contiguous: Build | None = None

    def in_place(self) -> Any:
        """A factory whose pieces are views of the data, which is filled when they are: merging does nothing.

        The factory itself where a piece has no such view.
        """
        if self.build_contiguous is None:
            return self
        try:
            self._view_pieces(self.key, self.data, self.replica_id, self.flattened_range)
        except _NoViewError:
            return self
        return compat.ShardedTensorFactory(
            self.key,
            self.data,
            self._view_pieces,
            _Constant(self.data),
            self.replica_id,
            self.flattened_range,
        )

    def _view_pieces(self, key: str, data: Any, replica_id: Any, flattened_range: Any) -> Any:
        if not isinstance(data, torch.Tensor) or not is_plain(data) or data.numel() == 0:
            raise _NoViewError
        _require_whole(key, flattened_range)
        require_pairs(data, self.interleave_size, key)
        stand_in = torch.empty(data.shape, dtype=data.dtype, device="meta")
        assert self.build_contiguous is not None
        pieces = self.build_contiguous(key, stand_in, replica_id, None)
        if isinstance(pieces, list):
            return [self._view_piece(piece, data) for piece in pieces]
        return self._view_piece(pieces, data)

    def _view_piece(self, piece: Any, data: torch.Tensor) -> RowShard:
        """The piece with the rows that its part of the stand-in stands for."""
        if not isinstance(piece, compat.ShardedTensor) or piece.allow_shape_mismatch:
            raise _NoViewError
        part, row = piece.data, math.prod(data.shape[1:])
        if part.shape[1:] != data.shape[1:] or not part.is_contiguous() or part.storage_offset() % row:
            raise _NoViewError
        rows = contiguous_view(data, self.interleave_size, part.storage_offset() // row, part.shape[0])
        if rows is None:
            raise _NoViewError
        return RowShard(
            **{each.name: getattr(piece, each.name) for each in dataclasses.fields(piece)}, rows=rows
        )


class _NoViewError(Exception):
    """A piece cannot be accessed in place."""


class _Constant:
    """A merge function: the data is in place already."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self, _: Any) -> Any:
        return self._value


def interleaved(entry: Any, interleave_size: int) -> InterleavedFactory:
    """The replacement for ``entry``, a ShardedTensor or ShardedTensorFactory whose data has interleaved rows.

    Raises:
        CheckpointMismatchError: its data does not divide into pairs of blocks, or is only a part of a rank's
            gate and up rows.
    """
    if entry.data is not None:
        require_pairs(entry.data, interleave_size, entry.key)
    build, merge = _contiguous_functions(entry)
    joins = not isinstance(entry, compat.ShardedTensorFactory) or compat.only_joins(merge)

    def build_copy(key: str, data: Any, replica_id: Any, flattened_range: Any) -> Any:
        _require_whole(key, flattened_range)
        if data is not None:
            data = permute_rows(data, interleave_size, False, key)
        return build(key, data, replica_id, None)

    def merge_copy(loaded: Any) -> Any:
        return permute_rows(merge(loaded), interleave_size, True, entry.key)

    return InterleavedFactory(
        entry.key,
        entry.data,
        build_copy,
        merge_copy,
        entry.replica_id,
        getattr(entry, "flattened_range", None),
        interleave_size,
        build if joins else None,
    )


def _contiguous_functions(entry: Any) -> tuple[Build, Callable[[Any], Any]]:
    """The build and merge functions of an entry, as of one with rows in the checkpoint's order."""
    if isinstance(entry, compat.ShardedTensorFactory):
        require_whole_pairs(entry.key, entry)
        return entry.build_fn, entry.merge_fn

    def build(key: str, data: Any, replica_id: Any, _: Any) -> Any:
        dtype = entry.dtype if data is None else data.dtype
        return dataclasses.replace(entry, key=key, data=data, dtype=dtype, replica_id=replica_id)

    return build, lambda loaded: loaded


def require_whole_pairs(key: str, factory: Any) -> None:
    """Refuse a factory whose data is only a part of a rank's [W, V]: its partner rows are elsewhere."""
    pieces: Any = None
    if factory.flattened_range is None and factory.data is not None:
        stand_in = torch.empty(factory.data.shape, dtype=factory.data.dtype, device="meta")
        pieces = factory.build_fn(factory.key, stand_in, factory.replica_id, None)
    # Megatron-Core builds one shard per half, but a single one where FSDP2 cut the halves over the
    # data-parallel ranks. Reordering such a piece by itself would mix up rows without a sign.
    if factory.flattened_range is not None or (isinstance(pieces, list) and len(pieces) == 1):
        raise CheckpointMismatchError(
            f"{key}: a data-parallel rank holds only a part of the gate and up rows, so they cannot be "
            "reordered; turn GLU interleaving off for this model, or shard it with Megatron FSDP"
        )


def _require_whole(key: str, flattened_range: Any) -> None:
    if flattened_range is not None:
        raise CheckpointMismatchError(
            f"{key}: its GLU rows are interleaved, and this optimizer's sharding cuts them anywhere, so that "
            "they cannot be stored in order. Set dist_ckpt_optim_fully_reshardable=True."
        )


def in_place(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every InterleavedFactory in a form that our pipeline saves and loads in place."""
    result: dict[str, Any] = compat.dict_list_map_outplace(
        lambda entry: entry.in_place() if isinstance(entry, InterleavedFactory) else entry,
        sharded_state_dict,
    )
    return result
