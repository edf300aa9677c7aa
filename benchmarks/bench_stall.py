# SPDX-License-Identifier: Apache-2.0
"""Measure background saves: how long training is blocked, and how long until the checkpoint is durable.

    python benchmarks/bench_stall.py --gigabytes 1 --rounds 5 --path DIR
    torchrun --nproc-per-node 2 benchmarks/bench_stall.py

With ``--device cuda`` the state is on the GPU, and a step ends when the GPU has finished it. With several
ranks, each has its part of the state, and times are those of the slowest.

In between, training continues: it updates every tensor in place once, and the slowdown of that step is part
of the cost ("step"). Megatron-Core forks, so CPU tensors are copied on the first write to each page, during
that step; nvidia-resiliency-ext does the same.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import rivals
import states
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hardware import limits

from ckpt_fast import FastStorageWriter, compat, settings
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.jobs.background import SaveHandle, wait_staged
from ckpt_fast.pipeline.memory.device_copy import StagingPolicy
from ckpt_fast.pipeline.save.parts import SaveOptions
from ckpt_fast.run.async_queue import AsyncCallsQueue

BLOCKED, STEP, DURABLE = "blocked", "step", "durable"
Finish = Callable[[], None]


class AsyncRival:
    """A way to save in the background. ``start`` returns a function that waits for the save."""

    name = ""

    def available(self) -> str | None:
        """Return why it cannot take part, or None if it can."""
        return None

    def wrap(self, state: states.State) -> Any:
        """Return the state in the form its users have at hand; not timed."""
        return rivals.sharded(state)

    def start(self, wrapped: Any, path: Path) -> Finish:
        """Begin a save; the result blocks until the save is durable."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Call what training must call before it changes the state; timed with the step."""


class Fast(AsyncRival):
    def __init__(self, mode: settings.StagingMode | None = None) -> None:
        self.name = "ckpt_fast" if mode is None else f"ckpt_fast, {mode}"
        self._queue = AsyncCallsQueue()
        self._staging = StagingPolicy(mode) if mode is not None else None

    def before_step(self) -> None:
        wait_staged()

    def start(self, wrapped: Any, path: Path) -> Finish:
        strategy = torch_dist.FastSaveStrategy()
        options = SaveOptions(snapshot=True, staging=self._staging)
        job = torch_dist.start_save(wrapped, str(path), strategy, options)
        self._queue.schedule_async_request(SaveHandle(job))
        return lambda: self._queue.maybe_finalize_async_calls(blocking=True) and None


class FastSync(AsyncRival):
    name = "ckpt_fast, synchronous"

    def start(self, wrapped: Any, path: Path) -> Finish:
        rivals.MegatronCoreDoor().save(wrapped, path)
        return lambda: None


class FastDcp(AsyncRival):
    name = "ckpt_fast DCP"

    def __init__(self) -> None:
        self._writer: FastStorageWriter | None = None

    def wrap(self, state: states.State) -> Any:
        return state

    def start(self, wrapped: Any, path: Path) -> Finish:
        self._writer = self._writer or FastStorageWriter(path)
        saved = dcp.async_save(wrapped, checkpoint_id=path, storage_writer=self._writer)
        return lambda: saved.result() and None


class MegatronCoreSync(AsyncRival):
    name = "mcore, synchronous"

    def start(self, wrapped: Any, path: Path) -> Finish:
        rivals.MegatronCore().save(wrapped, path)
        return lambda: None


class MegatronCore(AsyncRival):
    """Forks a writer process for every save."""

    name = "mcore async"

    def __init__(self) -> None:
        self._queue = compat.MCoreAsyncCallsQueue()

    def start(self, wrapped: Any, path: Path) -> Finish:
        path.mkdir(exist_ok=True)
        request = compat.dist_checkpointing.save(wrapped, str(path), async_sharded_save=True)
        self._queue.schedule_async_request(request)
        return lambda: self._queue.maybe_finalize_async_calls(blocking=True) and None


class Dcp(AsyncRival):
    name = "DCP async_save"

    def wrap(self, state: states.State) -> Any:
        return state

    def start(self, wrapped: Any, path: Path) -> Finish:
        saved = dcp.async_save(wrapped, storage_writer=dcp.FileSystemWriter(path, thread_count=2))
        return lambda: saved.result() and None


class Nvrx(AsyncRival):
    name = "nvrx async"

    def __init__(self) -> None:
        self._queue: Any = None

    def available(self) -> str | None:
        return None if compat.NVRxFileSystemWriterAsync else "nvidia-resiliency-ext is not installed"

    def wrap(self, state: states.State) -> Any:
        return state

    def start(self, wrapped: Any, path: Path) -> Finish:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue as NvrxQueue
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncRequest

        self._queue = self._queue or NvrxQueue(persistent=False)
        writer = compat.NVRxFileSystemWriterAsync(path, thread_count=2)
        plan = compat.save_state_dict_async_plan(wrapped, writer)
        save, preload, arguments = writer.get_save_function_and_args()
        finish = [lambda: compat.save_state_dict_async_finalize(*plan)]
        self._queue.schedule_async_request(AsyncRequest(save, arguments, finish, {}, preload))
        return lambda: self._queue.maybe_finalize_async_calls(blocking=True) and None


def contestant(rival: AsyncRival, state: states.State, path: Path) -> harness.Contestant:
    """Return a contestant that starts a save, trains one step and waits for the save."""
    wrapped: list[Any] = []

    def before() -> None:
        wrapped[:] = [rival.wrap(state)]

    def run() -> dict[str, float]:
        dist.barrier()
        begin = time.perf_counter()
        finish = rival.start(wrapped[0], path)
        started = time.perf_counter()
        rival.before_step()
        train(state)
        stepped = time.perf_counter()
        finish()
        return slowest(
            {BLOCKED: started - begin, STEP: stepped - started, DURABLE: time.perf_counter() - begin}
        )

    def after() -> None:
        wrapped.clear()
        dist.barrier()
        shutil.rmtree(path, ignore_errors=True)
        dist.barrier()

    return harness.Contestant(rival.name, run, before, after)


def slowest(seconds: dict[str, float]) -> dict[str, float]:
    """Return each figure's maximum over all ranks."""
    figures = torch.tensor(list(seconds.values()))
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    return dict(zip(seconds, figures.tolist(), strict=True))


@torch.no_grad()
def train(state: states.State) -> None:
    """Update every tensor in place."""
    for tensor in state.values():
        tensor.view(torch.uint8).bitwise_not_()
    synchronize(state)


def synchronize(state: states.State) -> None:
    if next(iter(state.values())).is_cuda:
        torch.cuda.synchronize()


def undisturbed_step(state: states.State) -> harness.Contestant:
    """Return a contestant that takes the step without a concurrent save."""

    def run() -> dict[str, float]:
        dist.barrier()
        begin = time.perf_counter()
        train(state)
        return slowest({STEP: time.perf_counter() - begin})

    return harness.Contestant("limit: no save", run)


def memcpy(state: states.State) -> harness.Contestant:
    """Return a contestant that copies all bytes into reused memory, page-locked if they are on a GPU."""
    move = limits.to_host(list(state.values()), limits.Threads(settings.io_threads()))

    def run() -> dict[str, float]:
        dist.barrier()
        begin = time.perf_counter()
        move()
        return slowest({BLOCKED: time.perf_counter() - begin})

    return harness.Contestant("limit: memcpy", run)


def main() -> None:
    options = harness.parse_arguments(__doc__)
    rivals.start_process_group()
    report = harness.Report(options)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    options.gigabytes /= ranks
    state = {f"{name}.{rank}": tensor for name, tensor in states.chosen(options).items()}
    state = {name: tensor.to(options.device) for name, tensor in state.items()}
    shared = [options.path]
    dist.broadcast_object_list(shared)
    modes = ("blocking", "overlapped", "device") if options.device == "cuda" else (None,)
    everyone = [*map(Fast, modes), FastSync(), FastDcp(), MegatronCore(), MegatronCoreSync(), Dcp(), Nvrx()]
    reasons = {rival.name: rival.available() for rival in everyone}
    copy, step = memcpy(state), undisturbed_step(state)
    contestants = [copy, step]
    contestants += [
        contestant(rival, state, shared[0] / "checkpoint") for rival in everyone if not reasons[rival.name]
    ]
    contestants = harness.selected(contestants, options.only)
    times = harness.measure(contestants, options.rounds)
    nbytes = ranks * states.total_nbytes(state)
    where = "1 rank" if ranks == 1 else f"{ranks} ranks"
    what = f"{where}, {ranks * len(state)} tensors, {nbytes / 1e9:.2f} GB, {options.rounds} rounds"
    for figure, title, reference, limit in (
        (BLOCKED, "the trainer is blocked", MegatronCoreSync.name, copy.name),
        (STEP, "the next step takes", None, step.name),
        (DURABLE, "from the call until durable", MegatronCoreSync.name, None),
    ):
        report.add(harness.table(f"{title}, {what}", times[figure], contestants, nbytes, reference, limit))
    report.add([f"not measured: {name} ({reason})" for name, reason in reasons.items() if reason])
    if rank == 0:
        report.finish()


if __name__ == "__main__":
    main()
