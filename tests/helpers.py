# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of several modules: ranks (real processes, a real gloo group) and a CPU RNG tracker.

Importing torch and Megatron takes seconds. So ranks are forked from a process that has done it, and serve one
call after another, each with the caller's environment variables and a process group of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# After one rank has failed, the others, which may be waiting for it forever, get this long to fail.
_GRACE_S = 5.0
_MANY_THREADS = 100


class RankError(AssertionError):
    """A rank raised; the text has its number and traceback. ``errors`` maps ranks to exception type names."""

    def __init__(self, message: str, errors: dict[int, str]) -> None:
        super().__init__(message)
        self.errors = errors

    def __reduce__(self) -> tuple[Any, ...]:
        return RankError, (str(self), self.errors)


class NoGroupError(Exception):
    """The ranks did not find each other, so nothing was called."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, fresh: bool = False
) -> list[Any]:
    """Call ``function(rank, *args)`` on ``world_size`` ranks of one gloo group.

    Args:
        function: importable from the top level of its module.
        world_size: number of ranks.
        args: picklable, the same for all ranks.
        timeout_s: for the call and for each collective in it.
        fresh: use new processes, which end with the call; for functions that change or end their process.

    Returns:
        Each rank's return value, by rank.

    Raises:
        RankError: a rank raised or exited.
        TimeoutError: the ranks did not finish.
    """
    try:
        return _run(function, world_size, args, timeout_s, fresh)
    except RankError as error:
        # Once in thousands of rendezvous, gloo hits a socket that is just being closed.
        if NoGroupError.__name__ not in error.errors.values():
            raise
        return _run(function, world_size, args, timeout_s, fresh)


def _run(
    function: Callable[..., Any], world_size: int, args: Sequence[Any], timeout_s: float, fresh: bool
) -> list[Any]:
    if fresh:
        ranks = _Ranks(world_size)
        try:
            return ranks.call(function, args, timeout_s)
        finally:
            ranks.stop()
    ranks = _pool.get(world_size) or _Ranks(world_size)
    # Whatever went wrong, processes in an unknown state must not be reused.
    _pool.pop(world_size, None)
    try:
        results = ranks.call(function, args, timeout_s)
    except RankError as error:
        _keep(ranks, world_size, len(error.errors) == world_size)
        raise
    except BaseException:
        ranks.stop()
        raise
    _keep(ranks, world_size, True)
    return results


def _keep(ranks: _Ranks, world_size: int, are_idle: bool) -> None:
    """Keep the ranks for the next call, unless they are in a bad state."""
    if are_idle and ranks.are_fit():
        _pool[world_size] = ranks
    else:
        ranks.stop()


class _Ranks:
    """Processes that run the calls they are sent."""

    def __init__(self, world_size: int) -> None:
        context = preloaded_processes()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, theirs))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def are_fit(self) -> bool:
        """Return whether they are alive and have no threads of leaked process groups."""
        for process in self._processes:
            if not process.is_alive() or _threads(process.pid) >= _MANY_THREADS:
                return False
        return True

    def stop(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()

    def call(self, function: Callable[..., Any], args: Sequence[Any], timeout_s: float) -> list[Any]:
        with tempfile.TemporaryDirectory(prefix="ranks_") as directory:
            name = (function.__module__, function.__qualname__)
            surroundings = (sys.path, dict(os.environ), os.getcwd())
            for connection in self._connections:
                connection.send((surroundings, name, args, os.path.join(directory, "rendezvous"), timeout_s))
            return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        texts: list[str] = []
        deadline = time.monotonic() + timeout_s
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                kind, value, text = _receive(connection)
                if kind == "result":
                    results[rank] = value
                    continue
                errors[rank] = value
                texts.append(f"--- rank {rank}\n{text}")
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if errors:
            raise RankError("\n".join(texts), errors)
        if waiting:
            raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish within {timeout_s} s")
        return [results[rank] for rank in range(len(self._connections))]


@functools.cache
def preloaded_processes() -> Any:
    """Start processes that have already imported torch and Megatron, if possible."""
    import torch

    # CUDA does not survive a fork, and an import may have initialized it.
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


_pool: dict[int, _Ranks] = {}


@atexit.register
def stop_ranks() -> None:
    """End the ranks that wait for a call. multiprocessing would join them at exit."""
    while _pool:
        _pool.popitem()[1].stop()


def _receive(connection: Connection) -> tuple[str, Any, str]:
    try:
        kind, value, text = connection.recv()
    except (EOFError, ConnectionResetError):
        return "error", "ProcessEnded", "the process ended without an answer"
    return kind, value, text


def _serve(rank: int, world_size: int, connection: Connection) -> None:
    """Run calls one after the other until the other end of the pipe is closed."""
    while True:
        try:
            (path, environment, directory), (module, qualname), args, rendezvous, timeout_s = (
                connection.recv()
            )
        except EOFError:
            return
        try:
            # As the caller has them now, not as they were when this process started.
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(directory)
            function = importlib.import_module(module)
            for part in qualname.split("."):
                function = getattr(function, part)
            answer = "result", _in_group(function, rank, world_size, rendezvous, timeout_s, args), ""
        except BaseException as error:
            answer = "error", type(error).__name__, traceback.format_exc()
        connection.send(answer)


def _in_group(
    function: Any, rank: int, world_size: int, rendezvous: str, timeout_s: float, args: Sequence[Any]
) -> Any:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except Exception as error:
        raise NoGroupError(str(error)) from error
    try:
        return function(rank, *args)
    finally:
        _leave_group()


def _leave_group() -> None:
    """Undo what a call may have set up for the whole process."""
    import torch.distributed as dist

    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    # Cycles keep groups alive, and each group its threads: thousands of them slow the machine down.
    if _threads("self") >= _MANY_THREADS:
        gc.collect()
    version = sys.modules.get("ckpt_fast.trainer.contents.version")
    if version is not None:
        version._CHECKPOINT_VERSION = None
    once = sys.modules.get("ckpt_fast.once")
    if once is not None:
        once._said.clear()


def _threads(process: int | str | None) -> int:
    return len(os.listdir(f"/proc/{process}/task"))


class CpuRngTracker:
    """Megatron's CUDA RNG tracker on the CPU generator: the same interface, for models that fork it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._states: dict[str, Any] = {}

    def is_initialized(self) -> bool:
        return bool(self._states)

    def get_states(self) -> dict[str, Any]:
        return dict(self._states)

    def set_states(self, states: dict[str, Any]) -> None:
        self._states = states

    def add(self, name: str, seed: int) -> None:
        import torch

        self._states[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        import torch

        outside = torch.get_rng_state()
        torch.set_rng_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def install_cpu_rng_tracker(seed: int = 1234) -> CpuRngTracker:
    """Make Megatron use a CpuRngTracker in this process, with the streams that Megatron itself adds."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random.initialize_rng_tracker()
    tracker = CpuRngTracker()
    for offset, name in enumerate(("model-parallel-rng", "data-parallel-rng", "expert-parallel-rng")):
        tracker.add(name, seed + offset)
    megatron_random._CUDA_RNG_STATE_TRACKER = tracker
    return tracker


def uninstall_rng_tracker() -> None:
    """Give Megatron a new tracker of its own, without streams."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random.initialize_rng_tracker(force_reset=True)


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Limit this process to ``more`` further bytes: a damaged pickle can request any amount."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
