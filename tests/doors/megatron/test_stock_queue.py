# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's own background save, with our strategy and the queues of the stock packages."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from ckpt_fast import FastLoadStrategy, FastSaveStrategy, compat, native
from ckpt_fast.doors.megatron import stock_queue, torch_dist
from ckpt_fast.doors.megatron.stock_queue import Flag, wait_until_written
from ckpt_fast.errors import AsyncSaveError, CheckpointWriteError
from ckpt_fast.jobs import background
from ckpt_fast.pipeline.memory.host_buffer import host_buffers
from ckpt_fast.run.async_queue import AsyncCallsQueue
from tests.helpers import run_ranks
from tests.models import megatron_on_cpu
from tests.trainer.training import error_of, require

ROWS = 300


def make_queue(kind: str) -> tuple[Any, str]:
    """Return (queue, name of the package whose requests it takes)."""
    if kind == "ours":
        return AsyncCallsQueue(), "mcore"
    package, persistent = kind.split("-")
    _, queue_class = compat.get_async_strategy(package, "AsyncCallsQueue")
    options = {"persistent": persistent == "persistent"}
    if "cpu_shm_mode" in inspect.signature(queue_class.__init__).parameters:
        options["cpu_shm_mode"] = True  # otherwise the worker of nvidia-resiliency-ext 0.7 needs a GPU
    return queue_class(**options), package


def start_save(state: dict[str, Any], directory: str, package: str) -> Any:
    """Call ``dist_checkpointing.save`` of either generation; return its request."""
    save, options = dist_checkpointing.save, {}
    strategy = FastSaveStrategy()
    if "async_strategy" in inspect.signature(save).parameters:
        options["async_strategy"] = package
    elif package != "mcore":
        # Megatron-Core 0.16 knows no other package, but passes on whatever the strategy returns.
        own = strategy.async_save
        strategy.async_save = lambda *arguments: own(*arguments, package)
    return save(state, directory, strategy, async_sharded_save=True, **options)


def sharded(rank: int, world_size: int, tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "w": ShardedTensor.from_rank_offsets("w", tensor, (0, rank, world_size)),
        "iteration": 7,
    }


def save_change_finalize(rank: int, kind: str, directory: str, world_size: int) -> list[int]:
    """Save three times; change the saved state as soon as each call has returned."""
    published, flags = [], []
    with megatron_on_cpu():
        queue, package = make_queue(kind)
        for number in range(3):
            path = os.path.join(directory, str(number))
            os.makedirs(path, exist_ok=True)
            tensor = torch.full((ROWS, 50), float(10 * number + rank))
            request = start_save(sharded(rank, world_size, tensor), path, package)
            tensor.fill_(-1)
            request.add_finalize_fn(lambda n=number: published.append(n))
            flags.append(request.async_fn_args[0])
            queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
    assert not any(map(os.path.exists, flags)), "what connects the processes is left behind"
    return published


def load_stock(rank: int, directory: str, world_size: int) -> list[float]:
    """Return what stock Megatron-Core loads from the three checkpoints for this rank."""
    values = []
    for number in range(3):
        into = sharded(rank, world_size, torch.zeros(ROWS, 50))
        with megatron_on_cpu():
            loaded = dist_checkpointing.load(into, os.path.join(directory, str(number)))
        assert loaded["iteration"] == 7
        values += torch.unique(loaded["w"]).tolist()
    return values


KINDS = ["ours", "mcore-temporal", "nvrx-temporal", "nvrx-persistent"]


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("kind", KINDS)
def test_stock_queues_publish_what_we_write(tmp_path: Path, kind: str, world_size: int) -> None:
    if kind.startswith("nvrx"):
        pytest.importorskip("nvidia_resiliency_ext.checkpointing.async_ckpt.core")
    published = run_ranks(
        save_change_finalize, world_size, kind, str(tmp_path), world_size, fresh=True, timeout_s=200
    )
    assert published == [[0, 1, 2]] * world_size
    values = run_ranks(load_stock, world_size, str(tmp_path), world_size)
    assert values == [[rank, 10 + rank, 20 + rank] for rank in range(world_size)]
    into = sharded(0, 1, torch.zeros(ROWS * world_size, 50))
    loaded = torch_dist.load(into, str(tmp_path / "2"), strategy=FastLoadStrategy())
    assert torch.unique(loaded["w"]).tolist() == [20.0 + rank for rank in range(world_size)]


def drop_and_save_again(rank: int, directory: str) -> float:
    """Do what a signal between the call and the queue does: the request is lost."""
    with megatron_on_cpu():
        request = start_save(sharded(rank, 1, torch.ones(ROWS, 50)), directory, "mcore")
        flag = request.async_fn_args[0]
        del request
        assert not os.path.exists(flag)
        queue = AsyncCallsQueue()
        queue.schedule_async_request(
            start_save(sharded(rank, 1, torch.full((ROWS, 50), 2.0)), directory, "mcore")
        )
        queue.close()
    loaded = torch_dist.load(sharded(0, 1, torch.zeros(ROWS, 50)), directory)
    return float(loaded["w"].unique())


def test_a_request_that_is_dropped_is_given_up(tmp_path: Path) -> None:
    assert run_ranks(drop_and_save_again, 1, str(tmp_path)) == [2.0]


def test_a_flag_is_set_once(tmp_path: Path) -> None:
    """Afterwards, the descriptor may belong to something else."""
    flag = Flag()
    flag.set()
    with open(tmp_path / "other", "w+b", buffering=0) as other:
        other.write(b"\0")
        flag.set()
        assert Path(other.name).read_bytes() == b"\0" and os.fstat(other.fileno())
    flag.remove()


def test_a_flag_goes_with_its_owner() -> None:
    before = len(os.listdir("/proc/self/fd"))
    flag = Flag()
    path = flag.path
    assert Path(path).read_bytes() == b"\0"
    del flag
    assert not os.path.exists(path) and len(os.listdir("/proc/self/fd")) == before


def test_a_flag_that_cannot_be_removed_is_closed() -> None:
    """The save is done: a byte that stays fails nothing, and goes with the next flag."""
    before = len(os.listdir("/proc/self/fd"))
    flag = Flag()
    with mock.patch.object(os, "unlink", side_effect=OSError(errno.EIO, "EIO")):
        flag.remove()
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.path.exists(flag.path)
    Flag().remove()
    assert not os.path.exists(flag.path)


def save_without_a_flag(rank: int, directory: str, failing: int) -> tuple[str, str]:
    """Start a save in the background while one rank has no room for a flag; return the error."""
    full = mock.patch.object(stock_queue, "FileIO", side_effect=OSError(errno.ENOSPC, "the memory is full"))
    with megatron_on_cpu(), full if rank == failing else contextlib.nullcontext():
        return error_of(lambda: start_save(sharded(rank, 2, torch.ones(ROWS, 50)), directory, "mcore"))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_without_room_for_a_flag_fails_the_save_on_all(tmp_path: Path, failing: int) -> None:
    for error in run_ranks(save_without_a_flag, 2, str(tmp_path), failing, timeout_s=30.0):
        require(error, "CheckpointWriteError", f"rank {failing}: ", "the memory is full")


def give_up_and_save_again(rank: int, directory: str, how: str) -> float:
    """Keeping the request and the error keeps nobody from saving again."""
    write_files = native.engine().write_files

    def hanging(*arguments: Any, **options: Any) -> Any:
        time.sleep(1.2)
        return write_files(*arguments, **options)

    native.engine().write_files = hanging
    os.environ["CKPT_FAST_TIMEOUT"] = "1" if how == "deadline" else "30"
    with megatron_on_cpu():
        queue = AsyncCallsQueue()
        request = start_save(sharded(rank, 1, torch.ones(ROWS, 50)), directory, "mcore")
        queue.schedule_async_request(request)
        if how == "abort":
            queue.close(abort=True)
        else:
            with pytest.raises(AsyncSaveError):
                if how == "cancel":
                    queue.handles[0].cancel()
                queue.maybe_finalize_async_calls(blocking=True)
        assert host_buffers.used_nbytes == 0 and not background._in_flight
        native.engine().write_files = write_files
        queue.schedule_async_request(
            start_save(sharded(rank, 1, torch.full((ROWS, 50), 2.0)), directory, "mcore")
        )
        queue.close()
    assert request.finalize_fns
    loaded = torch_dist.load(sharded(0, 1, torch.zeros(ROWS, 50)), directory)
    return float(loaded["w"].unique())


def save_over_one_in_flight(rank: int, directory: str) -> tuple[float, float]:
    """Megatron-Core may have written its common state before the second save is refused."""
    with megatron_on_cpu():
        queue = AsyncCallsQueue()
        state = sharded(rank, 1, torch.ones(ROWS, 50))
        queue.schedule_async_request(start_save(state, directory, "mcore"))
        with pytest.raises(CheckpointWriteError, match="is not over"):
            start_save({**sharded(rank, 1, torch.zeros(ROWS, 50)), "iteration": 8}, directory, "mcore")
        queue.close()
    loaded = torch_dist.load(sharded(0, 1, torch.zeros(ROWS, 50)), directory)
    return float(loaded["w"].unique()), loaded["iteration"]


def test_a_save_that_is_refused_leaves_the_one_in_flight_whole(tmp_path: Path) -> None:
    assert run_ranks(save_over_one_in_flight, 1, str(tmp_path)) == [(1.0, 7)]


@pytest.mark.parametrize("how", ["deadline", "abort", "cancel"])
def test_a_request_that_is_given_up_is_over(tmp_path: Path, how: str) -> None:
    assert run_ranks(give_up_and_save_again, 1, str(tmp_path), how, fresh=True) == [2.0]


def test_no_rank_publishes_what_another_did_not_write(tmp_path: Path) -> None:
    """Megatron-Core's metadata.json would come next."""
    answers = run_ranks(save_on_a_full_disk, 2, str(tmp_path), fresh=True)
    assert answers[0] == answers[1]
    assert answers[0].startswith("AsyncSaveError") and "rank 1" in answers[0]
    assert not (tmp_path / "metadata.json").exists() and not (tmp_path / ".metadata").exists()


def save_on_a_full_disk(rank: int, directory: str) -> str:
    write_files = native.write_files

    def failing(*arguments: Any) -> Any:
        raise OSError(28, "write 4096 bytes at 0: No space left on device", arguments[0][0])

    if rank == 1:
        native.write_files = failing
    try:
        with megatron_on_cpu():
            queue, package = make_queue("mcore-temporal")
            request = start_save(sharded(rank, 2, torch.ones(ROWS, 50)), directory, package)
            queue.schedule_async_request(request)
            queue.maybe_finalize_async_calls(blocking=True)
    except AsyncSaveError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        native.write_files = write_files
    return "published"


def test_waiting_ends_with_the_writer(tmp_path: Path) -> None:
    """A queue's worker must not outlive a trainer that was killed."""
    flag = tmp_path / "flag"
    flag.write_bytes(b"\0")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    wait_until_written(str(flag), gone.pid)
    wait_until_written(str(tmp_path / "no flag"), os.getpid())
    flag.write_bytes(b"\1")
    wait_until_written(str(flag), os.getpid())


FLAG = (
    "import ckpt_fast.doors.megatron.stock_queue as q; flag = q.Flag(); print(flag.path, flush=True); input()"
)


def test_the_flag_of_a_process_that_was_killed_goes_with_the_next() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FLAG]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        Flag().remove()
        assert os.path.exists(path), "it is still needed"
        process.kill()
    assert os.path.exists(path)
    Flag().remove()
    assert not os.path.exists(path)
