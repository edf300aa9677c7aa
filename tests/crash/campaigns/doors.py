# SPDX-License-Identifier: Apache-2.0
"""Every way to save and load a checkpoint, for tests that interrupt saves and loads.

A door saves a number and loads it again: all values in the checkpoint derive from that number, so a torn or
mixed checkpoint cannot pass for a complete one.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from ckpt_fast import FastLoadStrategy, FastSaveStrategy, FastStorageReader, FastStorageWriter, compat
from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.doors.dcp.direct import save as dcp_save
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.types import TensorRequest, TensorShard
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.save.parts import SaveOptions
from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.trainer.save.async_save import is_empty_async_queue
from tests.models import FLOPS, Run, Setup, differences, megatron_on_cpu
from tests.saves import new_save, save

ROWS, COLUMNS = 12, 16384  # a row is one 64 KiB chunk
FILES: dict[str, Any] = {"common_files": {"common.pt": b"c"}, "seal_files": {"metadata.json": b"{}"}}


def values(number: float) -> torch.Tensor:
    return torch.full((ROWS, COLUMNS), number)


def mine() -> tuple[int, int]:
    """Return this rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(number: float) -> TensorShard:
    """Return this rank's part of one tensor."""
    rank, ranks = mine()
    return TensorShard("w", values(number), (rank * ROWS, 0), (ranks * ROWS, COLUMNS))


def number_in(tensor: torch.Tensor) -> float:
    """Return the number that all elements equal."""
    numbers = torch.unique(tensor).tolist()
    assert len(numbers) == 1, f"a mixture of {numbers}"
    return float(numbers[0])


class Door(ABC):
    """One door.

    Attributes:
        seal: the file that makes a directory a checkpoint.
        is_run: whether a directory is the root of a run's checkpoints.
        polls: whether a background save is polled instead of awaited.
    """

    seal = ".metadata"
    is_run = False
    polls = False

    @abstractmethod
    def save(self, directory: str, number: float) -> None:
        """Save, and return when the checkpoint is published."""

    @abstractmethod
    def load(self, directory: str) -> float:
        """Load the checkpoint and return its number."""

    def is_published(self, directory: str) -> bool:
        """Return whether there is a checkpoint."""
        return os.path.exists(os.path.join(directory, self.seal))

    def give_up(self) -> None:  # noqa: B027
        """Drop what is in flight, as code that caught an interruption does."""

    def left(self) -> list[str]:
        """Return what finished saves have left behind outside their directories."""
        return []


class Queued:
    """Doors whose saves run in the background, in a queue of their own."""

    polls: bool

    def __init__(self) -> None:
        self._queue = AsyncCallsQueue()

    def _finish(self, request: Any) -> None:
        self._queue.schedule_async_request(request)
        while self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=not self.polls)

    def give_up(self) -> None:
        self._queue.close(abort=True)


class Pipeline(Door):
    seal = "metadata.json"

    def save(self, directory: str, number: float) -> None:
        save([shard(number)], directory, **FILES)

    def load(self, directory: str) -> float:
        into = torch.zeros(ROWS, COLUMNS)
        load_tensors(CheckpointIndex(directory), [TensorRequest("w", into, (mine()[0] * ROWS, 0))])
        return number_in(into)


class PipelineQueue(Queued, Pipeline):
    """Background saves through the pipeline's queue."""

    def save(self, directory: str, number: float) -> None:
        job = new_save([shard(number)], directory, snapshot=True, **FILES)
        job.stage()
        self._finish(SaveHandle(job))


class Dcp(Door):
    def save(self, directory: str, number: float) -> None:
        dcp.save(self._state(number), storage_writer=FastStorageWriter(directory))

    def load(self, directory: str) -> float:
        state = self._state(-1.0)
        dcp.load(state, storage_reader=FastStorageReader(directory))
        return self._number_in(state)

    @staticmethod
    def _number_in(state: dict[str, Any]) -> float:
        tensor, step = state.values()
        assert step == number_in(tensor)
        return number_in(tensor)

    @staticmethod
    def _state(number: float) -> dict[str, Any]:
        return {f"w{mine()[0]}": values(number), "step": number}


class DcpAsync(Dcp):
    def save(self, directory: str, number: float) -> None:
        writer = FastStorageWriter(directory)
        dcp.async_save(self._state(number), storage_writer=writer).result()  # type: ignore


class DcpQueue(Queued, Dcp):
    """Background saves without torch's own thread."""

    def save(self, directory: str, number: float) -> None:
        options = SaveOptions(snapshot=True)
        self._finish(SaveHandle(dcp_save.start_save(self._state(number), directory, options)))


class MegatronCore(Door):
    seal = "metadata.json"
    options: dict[str, Any] = {}  # noqa: RUF012

    def is_published(self, directory: str) -> bool:
        """Return whether the seal is valid: Megatron-Core writes it itself, and may leave it truncated."""
        try:
            return bool(json.loads(Path(directory, self.seal).read_text()))
        except (FileNotFoundError, ValueError):
            return False

    def save(self, directory: str, number: float) -> None:
        if "://" not in directory:
            os.makedirs(directory, exist_ok=True)
        self._save(self._state(number), directory)

    def load(self, directory: str) -> float:
        with megatron_on_cpu():
            loaded = dist_checkpointing.load(self._state(-1.0), directory, FastLoadStrategy())
        assert loaded["iteration"] == number_in(loaded["w"])
        return number_in(loaded["w"])

    def _save(self, state: dict[str, Any], directory: str) -> Any:
        with megatron_on_cpu():
            return dist_checkpointing.save(state, directory, FastSaveStrategy(), **self.options)

    @staticmethod
    def _state(number: float) -> dict[str, Any]:
        rank, ranks = mine()
        tensor = ShardedTensor.from_rank_offsets("w", values(number), (0, rank, ranks))
        return {"w": tensor, "iteration": number}


class MegatronCoreAsync(Queued, MegatronCore):
    options: dict[str, Any] = {"async_sharded_save": True}  # noqa: RUF012

    def _save(self, state: dict[str, Any], directory: str) -> None:
        with megatron_on_cpu():
            self._finish(super()._save(state, directory))

    def give_up(self) -> None:
        with contextlib.suppress(CheckpointError):
            self._queue.close()


class Documented(Door):
    """``save_checkpoint`` and ``load_checkpoint``; ``directory`` is the root, the step its number."""

    is_run = True
    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self._run = Run(Setup(), **self.config)
        self._run.__enter__()
        self._run.train(1)
        self._run.state.train_state.floating_point_operations_so_far = float(FLOPS)
        self._expected: dict[float, dict[str, Any]] = {}

    def expect(self, *numbers: float) -> None:
        """Learn what these checkpoints contain without having saved them; call it before loading anything."""
        for number in numbers:
            self._set("", number)
            self._expected[number] = self._run.fingerprint()

    def save(self, directory: str, number: float) -> None:
        self.expect(number)
        self._set(directory, number)
        self._run.save()
        self._finish()

    def load(self, directory: str) -> float:
        self._set(directory, -1.0)
        self._run.checkpoint.load = directory
        self._run.load()
        number = float(self._run.state.train_state.step)
        wrong = differences(self._expected[number], self._run.fingerprint())
        assert not wrong, f"of another save: {wrong}"
        return number

    def is_published(self, directory: str) -> bool:
        return os.path.exists(os.path.join(directory, "latest_checkpointed_iteration.txt"))

    def _finish(self) -> None:
        while not is_empty_async_queue(self._run.state):
            maybe_finalize_async_save(self._run.state, self._run.checkpoint, blocking=not self.polls)

    def _set(self, directory: str, number: float) -> None:
        self._run.checkpoint.save = directory
        self._run.state.train_state.step = int(number)
        self._run.state.train_state.floating_point_operations_so_far = float(FLOPS)
        with torch.no_grad():
            for parameter in self._run.model[0].parameters():
                parameter.fill_(number)


class DocumentedAsync(Documented):
    config: dict[str, Any] = {"async_save": True, "async_strategy": "mcore"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self._run.checkpoint.save = "set by each save"  # without one there is no queue
        self._run.state.initialize_async_checkpoint_worker()
        assert self._run.state.async_calls_queue is not None

    def give_up(self) -> None:
        with contextlib.suppress(CheckpointError):
            self._finish()


class Local(Queued, Door):
    """Local checkpoints; ``directory`` is the root, the iteration its number."""

    is_async = False

    def save(self, directory: str, number: float) -> None:
        manager = self._manager(directory)
        manager.find_latest()
        state = self._state(number)
        with megatron_on_cpu():
            request = manager.save(state, int(number), is_async=self.is_async)
        if request is not None:
            self._finish(request)

    def load(self, directory: str) -> float:
        manager = self._manager(directory)
        assert manager.find_latest() != -1
        state, identity = manager.load()
        tensor = next(iter(state.tensors))
        assert identity[0] == number_in(tensor)
        return number_in(tensor)

    def is_published(self, directory: str) -> bool:
        return bool(self._manager(directory).find_latest() != -1)

    def give_up(self) -> None:
        with contextlib.suppress(CheckpointError):
            self._queue.close()

    @staticmethod
    def _manager(directory: str) -> Any:
        from ckpt_fast import FastLocalCheckpointManager

        return FastLocalCheckpointManager(directory)

    @staticmethod
    def _state(number: float) -> Any:
        kind = compat.import_tensor_aware_state_dict()
        rank, ranks = mine()
        sharded = {"w": ShardedTensor.from_rank_offsets("w", values(number), (0, rank, ranks))}
        with megatron_on_cpu():
            return kind.from_state_dict(sharded, algo="atomic")[0]


class LocalAsync(Local):
    is_async = True


DOORS: dict[str, type[Door]] = {
    "pipeline": Pipeline,
    "pipeline-queue": PipelineQueue,
    "dcp": Dcp,
    "dcp-async": DcpAsync,
    "dcp-queue": DcpQueue,
    "megatron-core": MegatronCore,
    "megatron-core-async": MegatronCoreAsync,
    "documented": Documented,
    "documented-async": DocumentedAsync,
    "local": Local,
    "local-async": LocalAsync,
}


def one_rank() -> None:
    """Start a process group with one rank."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
