# SPDX-License-Identifier: Apache-2.0
"""Ours and the others, all behind one interface: save a state to a directory, load one into tensors.

Stock Megatron-Core and nvidia-resiliency-ext call CUDA functions on machines without a GPU;
``start_process_group`` makes those calls harmless. Nothing else in them is changed, and all run with their
defaults, except the number of files per rank if a rival's name states it.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from states import State

from ckpt_fast import FastLoadPlanner, FastSavePlanner, FastStorageReader, FastStorageWriter, compat
from ckpt_fast.doors.megatron import torch_dist


def start_process_group() -> None:
    """Start one rank, or torchrun's; without a GPU, stock Megatron-Core's CUDA calls become harmless."""
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)


def sharded(state: State, axis: int | None = None, fragments: int = 1, rank: int = 0) -> dict[str, Any]:
    """Return Megatron-Core's sharded state dict: whole tensors, or ``rank``'s fragments along ``axis``."""
    return {
        name: compat.ShardedTensor.from_rank_offsets(
            name, tensor, *([(min(axis, tensor.dim() - 1), rank, fragments)] if axis is not None else [])
        )
        for name, tensor in state.items()
    }


class Rival:
    """A way to save and load.

    Attributes:
        name: its row in the tables.
        durable: whether ``save`` returns with the bytes on the device; otherwise the caller syncs.
        package: what must be installed.
    """

    name = ""
    durable = False
    package = "torch"

    def available(self) -> str | None:
        """Return why it cannot take part, or None if it can."""
        return None if importlib.util.find_spec(self.package) else f"{self.package} is not installed"

    def wrap(self, state: State) -> Any:
        """Return the state in the form its users have at hand for a save or load; not timed."""
        return state

    def save(self, wrapped: Any, path: Path) -> None:
        """Write the state into the directory ``path``, which does not exist."""
        raise NotImplementedError

    def load(self, path: Path, wrapped: Any) -> None:
        """Fill the tensors of ``wrapped`` from what ``save`` has written."""
        raise NotImplementedError


class MegatronCoreDoor(Rival):
    """ckpt_fast behind Megatron-Core's sharded state dicts, as the documented API uses it."""

    name = "ckpt_fast"
    durable = True

    def wrap(self, state: State) -> Any:
        return sharded(state)

    def save(self, wrapped: Any, path: Path) -> None:
        job = torch_dist.start_save(wrapped, str(path), torch_dist.FastSaveStrategy())
        job.write()
        job.commit()

    def load(self, path: Path, wrapped: Any) -> None:
        torch_dist.load(wrapped, str(path))


class DcpDoor(Rival):
    """ckpt_fast behind torch.distributed.checkpoint."""

    name = "ckpt_fast DCP"
    durable = True

    def save(self, wrapped: Any, path: Path) -> None:
        dcp.save(wrapped, storage_writer=FastStorageWriter(path))

    def load(self, path: Path, wrapped: Any) -> None:
        dcp.load(wrapped, storage_reader=FastStorageReader(path))


class PlannedDcpDoor(DcpDoor):
    """The same with planners of ours."""

    name = "ckpt_fast DCP, planned"

    def save(self, wrapped: Any, path: Path) -> None:
        dcp.save(wrapped, storage_writer=FastStorageWriter(path), planner=FastSavePlanner())

    def load(self, path: Path, wrapped: Any) -> None:
        dcp.load(wrapped, storage_reader=FastStorageReader(path), planner=FastLoadPlanner())


class MegatronCore(Rival):
    """Stock Megatron-Core, format torch_dist."""

    name = "mcore"
    durable = True
    package = "megatron.core"

    def wrap(self, state: State) -> Any:
        return sharded(state)

    def save(self, wrapped: Any, path: Path) -> None:
        path.mkdir(exist_ok=True)
        compat.dist_checkpointing.save(wrapped, str(path))

    def load(self, path: Path, wrapped: Any) -> None:
        compat.dist_checkpointing.load(wrapped, str(path))


class Dcp(Rival):
    """Stock torch.distributed.checkpoint with its file system writer."""

    def __init__(self, threads: int, sync: bool = True) -> None:
        self._threads, self.durable = threads, sync
        self.name = f"DCP, {threads} thread{'s' * (threads > 1)}"

    def save(self, wrapped: Any, path: Path) -> None:
        writer = dcp.FileSystemWriter(path, thread_count=self._threads, sync_files=self.durable)
        dcp.save(wrapped, storage_writer=writer)

    def load(self, path: Path, wrapped: Any) -> None:
        dcp.load(wrapped, storage_reader=dcp.FileSystemReader(path))


class TorchSave(Rival):
    """torch.save of the whole state, loaded through a mapping of the file."""

    name = "torch.save"

    def save(self, wrapped: Any, path: Path) -> None:
        path.mkdir(exist_ok=True)
        torch.save(wrapped, path / "state.pt")

    def load(self, path: Path, wrapped: Any) -> None:
        _copy_into(wrapped, torch.load(path / "state.pt", mmap=True, weights_only=True))


class Safetensors(Rival):
    name = package = "safetensors"

    def save(self, wrapped: Any, path: Path) -> None:
        from safetensors.torch import save_file

        path.mkdir(exist_ok=True)
        save_file(wrapped, path / "state.safetensors")

    def load(self, path: Path, wrapped: Any) -> None:
        from safetensors.torch import load_file

        _copy_into(wrapped, load_file(path / "state.safetensors"))


class TorchSnapshot(Rival):
    name = package = "torchsnapshot"

    def wrap(self, state: State) -> Any:
        from torchsnapshot import StateDict

        return {"state": StateDict(**state)}

    def save(self, wrapped: Any, path: Path) -> None:
        from torchsnapshot import Snapshot

        Snapshot.take(str(path), wrapped)

    def load(self, path: Path, wrapped: Any) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(path)).restore(wrapped)


def all_rivals(sync: bool = True) -> tuple[list[Rival], list[str]]:
    """Return every rival that can take part here, and a line for each that cannot.

    Without ``sync``, only those that can omit syncs take part, and omit them.
    """
    everyone: Sequence[Rival] = [
        MegatronCoreDoor(),
        DcpDoor(),
        PlannedDcpDoor(),
        MegatronCore(),
        Dcp(1, sync),
        Dcp(2, sync),
        TorchSave(),
        Safetensors(),
        TorchSnapshot(),
    ]
    reasons = {rival.name: rival.available() for rival in everyone}
    if not sync:
        reasons[MegatronCore.name] = "it always syncs"
    absent = [f"not measured: {name} ({reason})" for name, reason in reasons.items() if reason]
    return [rival for rival in everyone if reasons[rival.name] is None], absent


def sync_tree(path: Path) -> None:
    """Sync every file below ``path`` to the device."""
    for file in [path, *path.rglob("*")]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def bring_into_page_cache(path: Path) -> None:
    """Read every file below ``path``, so that later reads are served from the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb", buffering=0) as stream:
                while stream.read(16 << 20):
                    pass


def drop_from_page_cache(path: Path) -> None:
    """Evict every file below ``path`` from the page cache. The files must have been synced."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _copy_into(wrapped: State, loaded: State) -> None:
    with torch.no_grad():
        for name, tensor in wrapped.items():
            tensor.copy_(loaded[name])
