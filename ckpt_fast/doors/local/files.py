# SPDX-License-Identifier: Apache-2.0
"""One local checkpoint of one rank: a directory in the format of every other checkpoint of ours.

The tensors of a tensor-aware state dict are its tensors; what is left of the state dict, with numbers in
their place, is its one object, made of plain data. So it is written, checked and loaded by the pipeline, and
``ckpt-fast verify`` reads it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ckpt_fast import compat, native
from ckpt_fast.errors import CheckpointCorruptError, CheckpointWriteError, UnsafeCheckpointError
from ckpt_fast.format.manifest import Manifest
from ckpt_fast.format.types import ObjectShard, Shard, TensorRequest, TensorShard
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.pipeline.load.complete import require_complete
from ckpt_fast.pipeline.load.load import load_tensors_and_objects
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.load.report import one_load
from ckpt_fast.pipeline.save.objects import object_bytes
from ckpt_fast.pipeline.save.plan import file_prefix, is_plain, require_values
from ckpt_fast.pipeline.save.seal import seal
from ckpt_fast.pipeline.save.sealed import contents_of
from ckpt_fast.pipeline.save.waves import Waves
from ckpt_fast.settings import Settings
from ckpt_fast.storage import commit, replacement
from ckpt_fast.storage.files import Directory

logger = logging.getLogger(__name__)
# What the checkpoints of a rank are called, and what is left of one that was not completed or not deleted.
NAME = re.compile(r"iter_(\d{7,})_(\d+)_local")
_PARTIAL = re.compile(NAME.pattern + r"\.(dirty|old)")
_STATE_KEY = "state_dict"
# Marks, as a key, the dictionaries that stand for something else.
_MARK = "ckpt_fast"


class Packed(NamedTuple):
    """A state dict taken apart.

    Attributes:
        payload: all of it but its tensors, as an item of a data file.
        tensors: in CPU memory, in the order of their numbers in ``payload``.
    """

    payload: bytes
    tensors: list[torch.Tensor]


def memory_of(state_dict: Any) -> set[int]:
    """Addresses of the memory that the tensors of a state dict are in, of all of them."""
    tensors: list[torch.Tensor] = []
    _without_tensors(state_dict, tensors)
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def require_all_values(state_dict: Any) -> None:
    """Local. Raise if a tensor of a state dict has no values.

    Raises:
        CheckpointMismatchError: it is on the meta device; naming it.
    """
    kinds: Any = tuple(_kinds().values())

    def look(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            require_values(name, value)
        elif isinstance(value, (compat.ShardedTensor, compat.ShardedObject)):
            look(value.data, value.key)
        elif isinstance(value, kinds):
            look(vars(value), "")
        elif isinstance(value, (dict, list)):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                look(child, f"{name}.{key}" if name else str(key))

    look(state_dict, "")


def pack_local(state_dict: Any, directory: str, live: Container[int] = ()) -> Packed:
    """Local. Take a state dict apart.

    Args:
        state_dict: a tensor-aware state dict with its tensors in CPU memory.
        directory: where it will be written, for errors.
        live: memory that may change as soon as this returns; tensors in it are copied. Megatron-Core and
            nvidia-resiliency-ext leave some of the state there when they copy it to the CPU: the steps of
            torch's Adam, or all that is on the CPU already.

    Raises:
        UnsafeCheckpointError: the state dict has an object that loading would refuse.
        TypeError: the state dict is of a class that is not known here.
    """
    tensors: list[torch.Tensor] = []
    try:
        payload = object_bytes(_without_tensors(_require_known(state_dict), tensors), "the state dict")
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"nothing was saved to {directory}: {error}") from error
    return Packed(
        payload,
        [
            tensor.detach().clone() if tensor.untyped_storage().data_ptr() in live else tensor.detach()
            for tensor in tensors
        ],
    )


class Origin(NamedTuple):
    """The origin of a local checkpoint: the save, the same on all ranks, and the rank whose state it is.

    ``notes`` are for the manifest, and the same on all ranks, too.
    """

    save_id: str
    iteration: int
    rank: int
    notes: Mapping[str, Any] = MappingProxyType({})


def write_local(
    packed: Packed,
    directory: str,
    partial: str,
    origin: Origin,
    report: SaveReport,
    progress: native.Progress,
) -> None:
    """Local. Write a state dict; on return it is durable. A crash leaves all of it or nothing.

    Where there is an older one of this name, the new one stays in ``partial`` until all ranks have theirs:
    see ``take_place``.

    Args:
        packed: the state dict.
        directory: the checkpoint.
        partial: the same until it is complete.
        origin: of which save, and whose state it is; the rank numbers the data file.
        report: what was written is added to it.
        progress: stops the writing; ``directory`` does not appear then.

    Raises:
        CheckpointWriteError: naming path and cause.
    """
    shards: list[Shard] = [ObjectShard(_STATE_KEY, packed.payload)]
    for number, tensor in enumerate(packed.tensors):
        shape = tuple(tensor.shape)
        shards.append(TensorShard(str(number), tensor, (0,) * len(shape), shape))
    report.directory = partial
    try:
        shutil.rmtree(partial, ignore_errors=True)
        commit.invalidate(partial)
        chosen = Settings.read()
        waves = Waves(
            report,
            file_prefix(origin.rank),
            bound=chosen.host_buffer_bytes,
            settings=chosen,
            progress=progress,
        )
        record = waves.run(shards)
        notes = {**origin.notes, "iteration": origin.iteration, "rank": origin.rank}
        contents = contents_of([record])
        manifest = Manifest(
            origin.save_id, record.files, [contents.digests], notes=notes, encoded_table=contents.table
        )
        seal(Directory(partial), contents.pickled, manifest, progress=progress)
        with commit.renaming(directory, progress):
            if os.path.lexists(directory):
                commit.fsync_directory(os.path.dirname(directory))
            else:
                replacement.swap(partial, directory)
    except CheckpointWriteError:
        raise
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot write the local checkpoint {directory}: {error.strerror or error} ({error.filename}). "
            "Check that non_persistent_local_ckpt_dir is writable and has room on this node.",
            error.errno,
            error.filename or directory,
        ) from error


def take_place(partial: str, directory: str) -> None:
    """Local. What ``write_local`` has left in ``partial``, if anything, changes places with ``directory``.

    The older one is whole in ``partial`` afterwards: as long as a rank may not have come to this, each rank
    can go on with the states of either save.

    Raises:
        CheckpointWriteError: it has not changed places.
    """
    if os.path.isdir(partial):
        replacement.swap(partial, directory)


def save_id_of(directory: str) -> str | None:
    """Local. The id of the save that a local checkpoint is of; None for one of an older version.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError: there is none that can be read.
    """
    manifest = OpenCheckpoint(Directory(directory)).index.manifest
    return manifest.save_id if manifest is not None else None


def read_local(directory: str, iteration: int, rank: int) -> tuple[Any, str | None]:
    """Local. The state dict in ``directory``, every byte of it compared with its checksum.

    Args:
        directory: the checkpoint.
        iteration, rank: of which it must be.

    Returns:
        The state dict, and the id of its save; None for one of an older version.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError: naming the file.
    """
    checkpoint = OpenCheckpoint(Directory(directory))
    index = checkpoint.index
    save_id = index.manifest.save_id if index.manifest is not None else None
    notes = index.manifest.notes if index.manifest is not None else {}
    if (notes.get("iteration", iteration), notes.get("rank", rank)) != (iteration, rank):
        raise CheckpointCorruptError(
            f"{directory} holds the state of rank {notes.get('rank')} at iteration {notes.get('iteration')}, "
            f"not that of rank {rank} at {iteration} as its name says: it was copied or renamed"
        )
    require_complete(checkpoint)
    tensors = []
    for number in range(len(index.names) - 1):
        saved = index.tensor(str(number))
        tensors.append(torch.empty(saved.shape, dtype=saved.dtype))
    requests = [
        TensorRequest(str(number), tensor, (0,) * tensor.dim())
        for number, tensor in enumerate(tensors)
        if tensor.numel()
    ]
    with one_load(directory, rank):
        hollow = load_tensors_and_objects(index, requests, [_STATE_KEY], verify=True)[_STATE_KEY]
    try:
        return _with_tensors(hollow, tensors), save_id
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointCorruptError(
            f"{directory} holds no state dict of a local checkpoint ({type(error).__name__}: {error})"
        ) from error


def remove_local(directory: str, partial: str) -> None:
    """Local. Delete a local checkpoint; at no time does a part of it pass for the whole."""
    shutil.rmtree(partial, ignore_errors=True)
    os.rename(directory, partial)
    shutil.rmtree(partial)


def remove_all_local(
    directory: str | os.PathLike[str], is_meant: Callable[[int, str], bool], rank: int
) -> None:
    """Local. Delete checkpoints by iteration and path, and leftovers of unfinished ones; problems are logged.

    Args:
        directory: where they are.
        is_meant: whether to delete that of an iteration, at a path.
        rank: for the log.
    """
    try:
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            match = NAME.fullmatch(name) or _PARTIAL.fullmatch(name)
            if match is None or not is_meant(int(match[1]), path):
                continue
            if NAME.fullmatch(name):
                remove_local(path, f"{path}.old")
            else:
                shutil.rmtree(path)
    except OSError as error:
        logger.warning("rank %d could not delete local checkpoints: %s", rank, error)


def _kinds() -> dict[str, type]:
    """Classes that a state dict is made of; their instances are their attributes, and nothing more."""
    return {
        "MCoreTensorAwareStateDict": compat.import_tensor_aware_state_dict(),
        "BasicTensorAwareStateDict": compat.import_basic_state_dict(),
        "ShardedTensor": compat.ShardedTensor,
        "ShardedObject": compat.ShardedObject,
    }


def _require_known(state_dict: Any) -> Any:
    known = [name for name in _kinds() if name.endswith("StateDict")]
    if type(state_dict).__name__ not in known:
        raise TypeError(f"local checkpoints hold a {' or '.join(known)}, not a {type(state_dict).__name__}")
    return state_dict


def _without_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value as plain data, its tensors appended to ``tensors`` and their numbers in their places."""
    kinds = {kind: name for name, kind in _kinds().items()}

    def hollow(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and is_plain(value):
            tensors.append(value)
            return {_MARK: "tensor", "number": len(tensors) - 1}
        if type(value) in kinds:
            return {_MARK: kinds[type(value)], "attributes": hollow(dict(vars(value)))}
        if type(value) in (dict, OrderedDict):
            if _MARK in value:
                raise UnsafeCheckpointError(f"a local checkpoint cannot hold a dict with the key {_MARK!r}")
            return type(value)((key, hollow(child)) for key, child in value.items())
        if type(value) is list:
            return [hollow(child) for child in value]
        return value

    return hollow(value)


def _with_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The original input of ``_without_tensors``."""
    kinds = _kinds()

    def filled(value: Any) -> Any:
        if type(value) is list:
            return [filled(child) for child in value]
        if type(value) not in (dict, OrderedDict):
            return value
        kind = value.get(_MARK)
        if kind is None:
            return type(value)((key, filled(child)) for key, child in value.items())
        if kind == "tensor":
            return tensors[value["number"]]
        instance: Any = object.__new__(kinds[kind])
        vars(instance).update(filled(value["attributes"]))
        return instance

    return filled(value)
