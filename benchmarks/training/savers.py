# SPDX-License-Identifier: Apache-2.0
"""The ways to save a training run in the background, all behind one interface.

Whatever a rival can keep from one save to the next, it keeps, if its name does not say otherwise.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import ckpt_fast
from ckpt_fast import compat
from ckpt_fast.checkpointing import init_checkpointing_context, maybe_finalize_async_save, save_checkpoint
from training.loop import Loop, train_gpt

_THREADS = 2


class Saver:
    """A way to save in the background.

    Attributes:
        name: its row in the tables.
    """

    name = ""

    def available(self) -> str | None:
        """Return why it cannot take part, or None if it can."""
        return None

    def save(self, loop: Loop, path: Path) -> None:
        """Collective. Save into the new directory ``path``; return when training may go on."""
        raise NotImplementedError

    def poll(self) -> bool:
        """Collective. Called after every step; returns whether the checkpoint is durable on all ranks."""
        raise NotImplementedError

    def close(self) -> None:
        """End its processes."""


class Fast(Saver):
    """The documented API."""

    def __init__(self, reuse: bool = True) -> None:
        self.name = "ckpt_fast" if reuse else "ckpt_fast, structure not constant"
        self._reuse = reuse
        self._state: Any = None

    def save(self, loop: Loop, path: Path) -> None:
        if self._state is None:
            loop.args.save = str(path)
            self._state = train_gpt.build_state(loop.args, loop.model)
            self._state.cfg.checkpoint.ckpt_assume_constant_structure = self._reuse
            self._context = init_checkpointing_context(self._state.cfg.checkpoint)
        self._state.cfg.checkpoint.save = str(path)
        self._state.train_state.step = loop.steps
        save_checkpoint(
            self._state, loop.model, loop.optimizer, loop.scheduler, 0, checkpointing_context=self._context
        )

    def poll(self) -> bool:
        maybe_finalize_async_save(self._state, self._state.cfg.checkpoint)
        return bool(self._state.async_calls_queue.get_num_unfinalized_calls() == 0)


class MegatronCore(Saver):
    """Stock Megatron-Core with a cached structure, writing in a process of its own.

    Args:
        persistent: one process for all saves; otherwise one is forked for each.
    """

    strategy = "mcore"

    def __init__(self, persistent: bool) -> None:
        self.name = f"{self.strategy} async, {'persistent' if persistent else 'temporary'} writer"
        self._persistent = persistent
        self._parallel: Any = None

    def available(self) -> str | None:
        if self._persistent and not torch.cuda.is_available():
            return "its writer process needs a GPU"
        return None

    def save(self, loop: Loop, path: Path) -> None:
        is_first = self._parallel is None
        if is_first:
            self._queue = self._new_queue()
            stock = self._new_strategy(thread_count=_THREADS, cached_metadata=True)
            group = compat.parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._parallel = compat.FullyParallelSaveStrategyWrapper(stock, group, True)
        if dist.get_rank() == 0:
            path.mkdir(parents=True)
        dist.barrier()
        # Megatron-Core 0.16 has one strategy only.
        which = {"async_strategy": self.strategy} if _takes_strategy() else {}
        request = compat.dist_checkpointing.save(
            loop.sharded_state_dict(),
            str(path),
            self._parallel,
            validate_access_integrity=is_first,
            async_sharded_save=True,
            **which,
        )
        self._queue.schedule_async_request(request)

    def poll(self) -> bool:
        self._queue.maybe_finalize_async_calls(blocking=False)
        return bool(self._queue.get_num_unfinalized_calls() == 0)

    def close(self) -> None:
        if self._parallel is not None:
            self._queue.close()

    def _new_queue(self) -> Any:
        return compat.MCoreAsyncCallsQueue(persistent=self._persistent)

    def _new_strategy(self, **options: Any) -> Any:
        return compat.TorchDistSaveShardedStrategy("torch_dist", 1, **options)


class Nvrx(MegatronCore):
    """nvidia-resiliency-ext, as Megatron-Core uses it.

    Args:
        persistent: see ``MegatronCore``.
        shared_memory: tensors are copied into memory that the process shares; needs no GPU.
    """

    strategy = "nvrx"
    _CACHES = ("_cached_identifiers", "_cached_tensor_data_ptrs", "_shm_tensor_cache")

    def __init__(self, persistent: bool, shared_memory: bool = False) -> None:
        super().__init__(persistent)
        self.name += " and shared memory" * shared_memory
        self._shared_memory = {"cpu_shm_mode": True} if shared_memory else {}
        self._caches: dict[str, Any] = {}

    def available(self) -> str | None:
        if compat.NVRxFileSystemWriterAsync is None:
            return "nvidia-resiliency-ext is not installed"
        if not _takes_strategy():
            return "this Megatron-Core does not use it"
        if self._shared_memory:
            has_it = "cpu_shm_mode" in inspect.signature(compat.TorchDistSaveShardedStrategy).parameters
            return None if has_it else "this Megatron-Core does not have it"
        return super().available()

    def save(self, loop: Loop, path: Path) -> None:
        self._use_own_caches()
        super().save(loop, path)

    def _use_own_caches(self) -> None:
        # Its class remembers, for all queues alike, what the writer process has.
        writer = compat.NVRxFileSystemWriterAsync
        names = [name for name in self._CACHES if hasattr(writer, name)]
        for name in names:
            setattr(writer, name, self._caches.setdefault(name, type(getattr(writer, name))()))

    def _new_queue(self) -> Any:
        queue = compat.get_async_strategy("nvrx", "AsyncCallsQueue")[1]
        return queue(persistent=self._persistent, **self._shared_memory)

    def _new_strategy(self, **options: Any) -> Any:
        return super()._new_strategy(**options, **self._shared_memory)


def _takes_strategy() -> bool:
    return "async_strategy" in inspect.signature(compat.dist_checkpointing.save).parameters


class FutureSaver(Saver):
    """A way that returns a future, and whose thread calls collectives while training calls others."""

    def __init__(self) -> None:
        self._group: Any = None
        self._saved: Any = None

    def save(self, loop: Loop, path: Path) -> None:
        self._group = self._group or dist.new_group(backend="gloo")
        self._saved = self._start(loop.state_dict(), path)

    def _start(self, state_dict: dict[str, Any], path: Path) -> Any:
        raise NotImplementedError

    def poll(self) -> bool:
        done = torch.tensor(int(self._saved.done()))
        dist.all_reduce(done, dist.ReduceOp.MIN)
        if done:
            self._saved.result()
        return bool(done)


class FastFunction(FutureSaver):
    name = "ckpt_fast.async_save"

    def _start(self, state_dict: dict[str, Any], path: Path) -> Any:
        return ckpt_fast.async_save(state_dict, path, process_group=self._group)


class Dcp(FutureSaver):
    """torch DCP, with its defaults, or with the plan and the host memory of the save before.

    Args:
        reuse: keep them.
    """

    def __init__(self, reuse: bool) -> None:
        super().__init__()
        self.name = "dcp.async_save, plan and memory kept" if reuse else "dcp.async_save"
        self._stager = DefaultStager(StagingOptions(False, False, False, False)) if reuse else None
        self._planner = dcp.DefaultSavePlanner(enable_plan_caching=True) if reuse else None

    def _start(self, state_dict: dict[str, Any], path: Path) -> Any:
        writer = dcp.FileSystemWriter(path, thread_count=_THREADS)
        return dcp.async_save(
            state_dict,
            storage_writer=writer,
            planner=self._planner,
            process_group=self._group,
            async_stager=self._stager,
        )

    def close(self) -> None:
        if self._stager:
            self._stager.close()


def everyone() -> list[Saver]:
    """Return all of them."""
    return [
        Fast(),
        Fast(reuse=False),
        MegatronCore(persistent=False),
        MegatronCore(persistent=True),
        Nvrx(persistent=False),
        Nvrx(persistent=True),
        Nvrx(persistent=True, shared_memory=True),
        FastFunction(),
        Dcp(reuse=False),
        Dcp(reuse=True),
    ]
