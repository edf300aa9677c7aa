# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's sharded state dicts as the pipeline's shards, and as requests for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.types import ObjectShard, Shard, TensorRequest, TensorShard
from ckpt_fast.glu.factory import RowShard
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors_and_objects
from ckpt_fast.pipeline.save.objects import object_bytes


def shards_of(sharded_state_dict: dict[str, Any]) -> list[Shard]:
    """The pieces this rank saves: main replicas only, objects of one key together.

    Raises:
        CheckpointMismatchError: a sharded tensor has no data, or is of a kind the files cannot hold.
        UnsafeCheckpointError: an object could not be loaded again.
    """
    shards: list[Shard] = []
    objects: dict[str, list[Any]] = defaultdict(list)
    for entry in compat.nested_values(sharded_state_dict):
        if not compat.is_main_replica(entry.replica_id):
            continue
        if isinstance(entry, compat.ShardedObject):
            objects[entry.unique_key].append(entry.data)
            continue
        if isinstance(entry, RowShard):
            place = (tuple(entry.global_offset), tuple(entry.global_shape), _sizes(entry))
            shards.append(TensorShard(entry.key, entry.rows, *place))
            continue
        if entry.data is None:
            raise CheckpointMismatchError(f"{entry.key} is to be saved but has no data on this rank")
        data = entry.data.detach()[(None,) * entry.prepend_axis_num]
        shards.append(TensorShard(entry.key, data, tuple(entry.global_offset), tuple(entry.global_shape)))
    shards.extend(ObjectShard(key, object_bytes(values, key)) for key, values in objects.items())
    return shards


def load_sharded(
    sharded_state_dict: dict[str, Any], index: CheckpointIndex, verify: bool | None = None
) -> dict[str, Any]:
    """Local. The same nesting with every ShardedTensor and ShardedObject replaced by its loaded value."""
    entries = list(compat.nested_values(sharded_state_dict))
    tensors = [entry for entry in entries if isinstance(entry, compat.ShardedTensor)]
    keys = {entry.unique_key for entry in entries if isinstance(entry, compat.ShardedObject)}
    objects = load_tensors_and_objects(index, list(_requests(tensors, index)), sorted(keys), verify)
    values = {key: iter(value) for key, value in objects.items()}

    def loaded(entry: Any) -> Any:
        if isinstance(entry, compat.ShardedTensor):
            return entry.data
        try:
            return next(values[entry.unique_key])
        except StopIteration:
            raise CheckpointMismatchError(
                f"{entry.unique_key} is asked for more often than {index.directory} has it"
            ) from None

    result: dict[str, Any] = compat.dict_list_map_outplace(loaded, sharded_state_dict)
    return result


def merge_in_place(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same nesting with factories that leave alone what was read into the tensors they were made for.

    Megatron-Core's factories cut a tensor in pieces, and join the loaded pieces to a new one: a second copy
    of all gated layers, while the pieces, if they are views, have filled the first. A factory whose merge
    does anything else is as it was.
    """

    def joins(entry: Any) -> bool:
        return (
            isinstance(entry, compat.ShardedTensorFactory)
            and isinstance(entry.data, torch.Tensor)
            and compat.only_joins(entry.merge_fn)
        )

    def in_place(entry: Any) -> Any:
        if not joins(entry):
            return entry
        return dataclasses.replace(entry, merge_fn=functools.partial(_join, entry.merge_fn, entry.data))

    if not any(map(joins, compat.nested_values(sharded_state_dict))):
        return sharded_state_dict
    result: dict[str, Any] = compat.dict_list_map_outplace(in_place, sharded_state_dict)
    return result


def _join(merge_fn: Callable[[Any], Any], whole: torch.Tensor, pieces: Any) -> Any:
    return whole.detach() if isinstance(pieces, list) and _make_up(whole, pieces) else merge_fn(pieces)


def _make_up(whole: torch.Tensor, pieces: list[Any]) -> bool:
    """Whether the pieces are views of the tensor's rows, in its order, that leave none out."""
    if not whole.is_contiguous() or not whole.dim():
        return False
    end, rows = whole.data_ptr(), whole.shape[1:]
    for piece in pieces:
        if not isinstance(piece, torch.Tensor) or not piece.is_contiguous() or piece.shape[1:] != rows:
            return False
        if (piece.dtype, piece.device) != (whole.dtype, whole.device):
            return False
        if piece.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return False
        if piece.numel():
            if piece.data_ptr() != end:
                return False
            end += piece.nbytes
    return end == whole.data_ptr() + whole.nbytes


def _requests(tensors: Iterable[Any], index: CheckpointIndex) -> Iterator[TensorRequest]:
    for entry in tensors:
        saved = index.tensor(entry.key).shape
        if isinstance(entry, RowShard):
            _require_shape(entry, saved, index)
            yield TensorRequest(entry.key, entry.rows, tuple(entry.global_offset), _sizes(entry))
            continue
        entry.init_data("cpu", torch.zeros if entry.allow_shape_mismatch else torch.empty)
        entry.data = entry.data.detach()
        destination = entry.data[(None,) * entry.prepend_axis_num]
        if entry.allow_shape_mismatch:
            # Padding that only one side has stays zero.
            entry.data.zero_()
            for axis, (offset, limit) in enumerate(zip(entry.global_offset, saved, strict=True)):
                size = min(destination.shape[axis], max(limit - offset, 0))
                destination = destination.narrow(axis, 0, size)
        else:
            _require_shape(entry, saved, index)
        if destination.numel():
            yield TensorRequest(entry.key, destination, tuple(entry.global_offset))


def _sizes(entry: Any) -> tuple[int, ...]:
    """The extents of a shard in every dimension of the whole tensor."""
    return (*[1] * entry.prepend_axis_num, *entry.local_shape)


def _require_shape(entry: Any, saved: tuple[int, ...], index: CheckpointIndex) -> None:
    if saved != tuple(entry.global_shape):
        raise CheckpointMismatchError(
            f"{entry.key} has shape {saved} in {index.directory} but {tuple(entry.global_shape)} in this "
            "model. Use the configuration the checkpoint was saved with."
        )


@contextlib.contextmanager
def mismatches(consequence: str) -> Iterator[None]:
    """Megatron-Core's errors about keys and sharding, converted to our error that names the consequence."""
    try:
        yield
    except compat.CheckpointingException as error:
        raise CheckpointMismatchError(
            f"{consequence}: {error}. Check that all ranks build the same model, with the configuration of "
            "the checkpoint."
        ) from error
