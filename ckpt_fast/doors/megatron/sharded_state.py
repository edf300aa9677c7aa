# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's sharded state dicts as the pipeline's shards, and as requests for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.types import ObjectShard, Shard, TensorRequest, TensorShard
from ckpt_fast.glu.factory import RowShard
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import prepare
from ckpt_fast.pipeline.save.objects import object_bytes
from ckpt_fast.pipeline.save.plan import require_all_values

# The keys and list indices that lead to an entry of a nested state dict.
Path = tuple[Any, ...]


def entries_of(sharded_state_dict: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Every entry of a nested state dict, with its path."""
    containers: list[tuple[Path, Any]] = [((), sharded_state_dict)]
    while containers:
        path, container = containers.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if isinstance(value, (dict, list)):
                containers.append(((*path, key), value))
            else:
                yield (*path, key), value


def require_distinct_names(sharded_state_dict: dict[str, Any]) -> None:
    """Local. Raise if two entries have paths that are equal once they are joined with dots.

    Raises:
        CheckpointMismatchError: as for a key "a.b" beside a dict "a" with a key "b".
    """
    names: list[str] = []
    containers: list[tuple[str, Any]] = [("", sharded_state_dict)]
    while containers:
        prefix, container = containers.pop()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, (dict, list)):
                containers.append((f"{prefix}{key}.", value))
            else:
                names.append(f"{prefix}{key}")
    if len(set(names)) < len(names):
        name, _ = Counter(names).most_common(1)[0]
        raise CheckpointMismatchError(
            f"two entries of the sharded state dict have the path {name!r}, one of them by a key with a dot "
            "in it. torch DCP, whose files these are, joins keys with dots: rename one of them."
        )


def require_distinct_objects(sharded_state_dict: dict[str, Any]) -> None:
    """Local, for one rank. Raise if two objects that are to be saved have the same key.

    Raises:
        CheckpointMismatchError: naming the key.
    """
    saved = Counter(
        entry.unique_key
        for entry in compat.nested_values(sharded_state_dict)
        if isinstance(entry, compat.ShardedObject) and compat.is_main_replica(entry.replica_id)
    )
    for key, count in saved.items():
        if count > 1:
            raise CheckpointMismatchError(
                f"nothing was saved: {count} objects of the sharded state dict have the key {key!r}. Each "
                "needs a key of its own, or one main replica: check key and replica_id."
            )


def shards_of(sharded_state_dict: dict[str, Any]) -> list[Shard]:
    """The pieces this rank saves: main replicas only, objects of one key together.

    Raises:
        CheckpointMismatchError: a sharded tensor has no data or is on the meta device, or two entries have
            the same name.
        UnsafeCheckpointError: an object could not be loaded again.
    """
    require_distinct_names(sharded_state_dict)
    shards: list[Shard] = []
    objects: dict[str, list[Any]] = defaultdict(list)
    saved = [
        entry
        for entry in compat.nested_values(sharded_state_dict)
        if compat.is_main_replica(entry.replica_id)
    ]
    tensors = [entry for entry in saved if isinstance(entry, compat.ShardedTensor)]
    plain = [entry for entry in tensors if not isinstance(entry, RowShard)]
    for entry in plain:
        if entry.data is None:
            raise CheckpointMismatchError(f"{entry.key} is to be saved but has no data on this rank")
    require_all_values([entry.key for entry in plain], [entry.data for entry in plain])
    with torch._C.DisableTorchFunction():
        for entry in tensors:
            place = (tuple(entry.global_offset), tuple(entry.global_shape))
            if isinstance(entry, RowShard):
                shards.append(TensorShard(entry.key, entry.rows, *place, _sizes(entry)))
                continue
            data = entry.data.detach()
            if entry.prepend_axis_num:
                data = data[(None,) * entry.prepend_axis_num]
            shards.append(TensorShard(entry.key, data, *place))
    for entry in saved:
        if isinstance(entry, compat.ShardedObject):
            objects[entry.unique_key].append(entry.data)
    shards.extend(ObjectShard(key, object_bytes(values, key)) for key, values in objects.items())
    return shards


class ShardedLoad:
    """One rank's load of a sharded state dict, which fits the checkpoint. Nothing has been filled yet.

    Raises:
        CheckpointMismatchError: the checkpoint lacks an entry, or has it in another shape; or two entries
            have the same name.
        CheckpointCorruptError: the checkpoint lacks a part of a tensor.
    """

    def __init__(self, sharded_state_dict: dict[str, Any], index: CheckpointIndex) -> None:
        require_distinct_names(sharded_state_dict)
        self._state_dict, self._index = sharded_state_dict, index
        entries = list(compat.nested_values(sharded_state_dict))
        tensors = [entry for entry in entries if isinstance(entry, compat.ShardedTensor)]
        keys = {entry.unique_key for entry in entries if isinstance(entry, compat.ShardedObject)}
        self._prepared = prepare(index, list(_requests(tensors, index)), sorted(keys))
        self._padded = [entry for entry in tensors if entry.allow_shape_mismatch]

    def read(self, verify: bool | None = None) -> dict[str, Any]:
        """The same nesting with every ShardedTensor and ShardedObject replaced by its loaded value."""
        for entry in self._padded:
            entry.data.zero_()  # padding that only one side has stays zero
        values = {key: iter(value) for key, value in self._prepared.read_objects(verify).items()}

        def loaded(entry: Any) -> Any:
            if isinstance(entry, compat.ShardedTensor):
                return entry.data
            try:
                return next(values[entry.unique_key])
            except StopIteration:
                raise CheckpointMismatchError(
                    f"{entry.unique_key} is asked for more often than {self._index.directory} has it"
                ) from None

        result: dict[str, Any] = compat.dict_list_map_outplace(loaded, self._state_dict)
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
        saved = index.tensor_shape(entry.key)
        if isinstance(entry, RowShard):
            _require_shape(entry, saved, index)
            yield TensorRequest(entry.key, entry.rows, tuple(entry.global_offset), _sizes(entry))
            continue
        entry.init_data("cpu", torch.zeros if entry.allow_shape_mismatch else torch.empty)
        entry.data = entry.data.detach()
        destination = entry.data
        if entry.prepend_axis_num:
            destination = destination[(None,) * entry.prepend_axis_num]
        if entry.allow_shape_mismatch:
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
