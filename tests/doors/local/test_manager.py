# SPDX-License-Identifier: Apache-2.0
"""Local checkpoints with replicas, with lost directories, damaged files and failing writes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import compat, native
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, UnsafeCheckpointError
from ckpt_fast.run.async_queue import AsyncCallsQueue
from tests.helpers import run_ranks
from tests.interop.saved import values_of, wrong_values
from tests.models import Run, Setup, identical, megatron_on_cpu, other

pytestmark = pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")

SETUP = Setup(distributed=True, bf16=True)


def manager(root: str, replicated: bool = True) -> Any:
    from ckpt_fast import FastLocalCheckpointManager

    strategy = None
    if replicated:
        _, strategies = compat.import_local_checkpointing()
        strategy = strategies.from_replication_params(1, 2)  # ranks 0 and 1, ranks 2 and 3
    return FastLocalCheckpointManager(root, repl_strategy=strategy)


def local_state(run: Run) -> Any:
    kind = compat.import_tensor_aware_state_dict()
    with megatron_on_cpu():
        group = compat.get_pg_collection(run.model).dp_cp
        return kind.from_state_dict(
            run.sharded_state_dict(), algo="fully_parallel", parallelization_group=group
        )[0]


def what_is_wrong(local: Any, expected: Any) -> list[str]:
    """Return the names of values that a run resumed from ``local`` does not have as saved."""
    with Run(other(SETUP)) as run, megatron_on_cpu():
        run._step()
        group = compat.get_pg_collection(run.model).dp_cp
        state = local.to_state_dict(
            run.sharded_state_dict(is_loading=True), algo="fully_parallel", parallelization_group=group
        )
    return wrong_values(expected, state)


def recover(root: str, expected: Any, replicated: bool = True) -> str:
    """Resume from what is there; return the log messages."""
    with errors_of("ckpt_fast.doors.local.manager") as lines:
        found = manager(root, replicated)
        assert found.find_latest() == 2
        local, identity = found.load()
    assert identity[0] == 2
    assert what_is_wrong(local, expected) == []
    return "\n".join(lines)


@contextmanager
def errors_of(name: str) -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(name).removeHandler(handler)


def damage(root: str, keeper: int, owner: int) -> None:
    """Flip a bit in rank ``keeper``'s copy of the state of rank ``owner``."""
    path = os.path.join(root, str(keeper), f"iter_0000002_{owner}_local", f"__{owner}_0.distcp")
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def lose_and_recover(rank: int, root: str) -> None:
    """Lose directories and recover. The manager needs no GPU, so nothing is patched while it works."""
    with Run(SETUP) as run:
        run.train(1)
        saver = manager(root)
        assert saver.find_latest() == -1
        assert saver.save(local_state(run), 1) is None
        run.train(1)
        with megatron_on_cpu():
            expected = values_of(run.sharded_state_dict())
        queue = AsyncCallsQueue()
        queue.schedule_async_request(saver.save(local_state(run), 2, is_async=True))
        run.train(1)
        queue.close()
        for thread in saver_threads():
            thread.join()
    kept = sorted(os.listdir(os.path.join(root, str(rank))))
    clique = [rank // 2 * 2, rank // 2 * 2 + 1]
    assert kept == [f"iter_0000002_{owner}_local" for owner in clique]

    step(lambda: shutil.rmtree(os.path.join(root, "3")) if rank == 3 else None)
    assert recover(root, expected) == ""
    step(lambda: damage(root, 1, 1) if rank == 1 else None)
    logged = recover(root, expected)
    assert ("rank 1: a local checkpoint is damaged" in logged) == (rank == 1)
    assert rank != 1 or "iter_0000002_1_local/__1_0.distcp" in logged

    fail_on_one_rank(rank, root)
    assert manager(root).find_latest() == 2

    step(lambda: damage(root, 0, 1) if rank == 0 else None)
    lost = manager(root)
    assert lost.find_latest() == 2
    with pytest.raises(CheckpointCorruptError, match="is whole on every rank"):
        lost.load()


def saver_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_cleanup" in thread.name]


def step(action: Any) -> None:
    torch.distributed.barrier()
    action()
    torch.distributed.barrier()


def fail_on_one_rank(rank: int, root: str) -> None:
    write_files = native.write_files

    def failing(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "write 4096 bytes at 0: No space left on device", arguments[0][0])

    if rank == 2:
        native.write_files = failing
    try:
        with Run(SETUP) as run:
            run.train(1)
            with pytest.raises(CheckpointError, match=r"rank 2: .*No space left on device"):
                manager(root).save(local_state(run), 3)
    finally:
        native.write_files = write_files


def test_replicas_stand_in_for_what_is_lost_or_damaged(tmp_path: Path) -> None:
    run_ranks(lose_and_recover, 4, str(tmp_path), timeout_s=240)


def state_dict_of(common: dict[str, Any]) -> Any:
    tensors = {
        str(dtype): compat.ShardedTensor.from_rank_offsets(str(dtype), tensor)
        for dtype, tensor in {
            torch.bfloat16: torch.arange(6).reshape(2, 3).bfloat16(),
            torch.float32: torch.randn(4, 5).t(),
            torch.int64: torch.tensor(3),
            torch.bool: torch.zeros(0, 4, dtype=torch.bool),
        }.items()
    }
    objects = {"o": compat.ShardedObject("o", {"any": [1, (2, torch.ones(2))]}, (1,), (0,))}
    return compat.import_tensor_aware_state_dict()(
        common=common, sharded_state_dict={"tensors": tensors, "objects": [objects]}
    )


def save_one(rank: int, root: str) -> None:
    saver = manager(root, replicated=False)
    common = {"step": 3, "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], 7: torch.ones(3)}
    # An interrupted save of the same iteration must not get in the way.
    os.makedirs(os.path.join(root, "0", "iter_0000005_0_local.dirty", "folder"))
    saved = state_dict_of(common)
    saver.save(saved, 5)
    with pytest.raises(UnsafeCheckpointError, match=r"nothing was saved to .*iter_0000006"):
        saver.save(state_dict_of({"function": print}), 6)
    assert saver.find_latest() == 5
    loaded, _ = saver.load()
    assert type(loaded) is type(saved) and not loaded.is_hollow
    assert identical(loaded.common, common)
    for name, entry in saved.sharded_state_dict["tensors"].items():
        again = loaded.sharded_state_dict["tensors"][name]
        assert {**vars(again), "data": None} == {**vars(entry), "data": None}
        assert identical(again.data, entry.data)
    (again,), (entry,) = loaded.sharded_state_dict["objects"], saved.sharded_state_dict["objects"]
    assert identical(again["o"].data, entry["o"].data)
    saver.save(saved, 6)
    assert os.listdir(os.path.join(root, "0")) == ["iter_0000006_0_local"]


def save_while_training_goes_on(rank: int, root: str) -> None:
    saver, queue, gate = manager(root, replicated=False), AsyncCallsQueue(), threading.Event()
    write_files = native.write_files

    def later(*arguments: Any, **options: Any) -> Any:
        gate.wait()
        return write_files(*arguments, **options)

    common = {"state": [{"step": torch.tensor(3.0)}], "groups": [{"lr": 0.1}]}
    state = state_dict_of(common)
    weight = state.sharded_state_dict["tensors"][str(torch.float32)].data
    expected = weight.clone()
    native.write_files = later
    try:
        queue.schedule_async_request(saver.save(state, 5, is_async=True))
        weight += 1
        common["state"][0]["step"] += 1
        common["groups"][0]["lr"] = 0.2
    finally:
        gate.set()
        queue.close()
        native.write_files = write_files
    assert saver.find_latest() == 5
    loaded, _ = saver.load()
    assert identical(loaded.common, {"state": [{"step": torch.tensor(3.0)}], "groups": [{"lr": 0.1}]})
    assert identical(loaded.sharded_state_dict["tensors"][str(torch.float32)].data, expected)


def test_a_save_in_the_background_holds_what_was_when_it_began(tmp_path: Path) -> None:
    run_ranks(save_while_training_goes_on, 1, str(tmp_path))


def test_a_state_dict_comes_back_as_it_was(tmp_path: Path) -> None:
    run_ranks(save_one, 1, str(tmp_path))


def interrupt_a_save(rank: int, root: str) -> None:
    """Interrupt a save (Ctrl-C) on a slow disk: writing stops, and nothing appears, now or later."""
    saver, write_files = manager(root, replicated=False), native.write_files
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def slowly(*arguments: Any, progress: native.Progress, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not progress.stopped and time.monotonic() < deadline:
            time.sleep(0.01)
        return write_files(*arguments, progress=progress, **options)

    native.write_files = slowly
    try:
        with pytest.raises(KeyboardInterrupt):
            saver.save(state_dict_of({}), 5)
    finally:
        native.write_files = write_files
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ckpt_fast")]
    assert manager(root, replicated=False).find_latest() == -1
    saver.save(state_dict_of({}), 5)
    assert os.listdir(os.path.join(root, "0")) == ["iter_0000005_0_local"]


def test_an_interrupted_save_is_ended(tmp_path: Path) -> None:
    run_ranks(interrupt_a_save, 1, str(tmp_path), fresh=True)


def save_again_halfway(rank: int, root: str) -> None:
    """Kill rank 1 after all have written and before its new state is in place."""

    def save(step: int, fails: bool = False) -> None:
        saver = manager(root, replicated=False)
        if fails:
            saver._take_places = lambda _: (_ for _ in ()).throw(CheckpointError("no power on rank 1"))
        saver.save(state_dict_of({"step": torch.tensor(float(step))}), 5)

    def load() -> float:
        found = manager(root, replicated=False)
        assert found.find_latest() == 5
        return float(found.load()[0].common["step"])

    save(1)
    with pytest.raises(CheckpointError, match="no power on rank 1"):
        save(2, fails=rank == 1)
    steps: list[Any] = [None, None]
    torch.distributed.all_gather_object(steps, (load(), load()))
    # Each has the state of the same save, and keeps it.
    assert steps in ([(1.0, 1.0)] * 2, [(2.0, 2.0)] * 2)
    save(3)
    assert load() == 3.0
    assert os.listdir(os.path.join(root, str(rank))) == [f"iter_0000005_{rank}_local"]


def test_ranks_of_two_saves_go_on_with_one(tmp_path: Path) -> None:
    run_ranks(save_again_halfway, 2, str(tmp_path))


def fail_again(rank: int, root: str) -> None:
    """Fail to write the new state on one rank: the old state of the iteration stays on both."""
    write_files = native.write_files

    def failing(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device", "a file")

    manager(root, replicated=False).save(state_dict_of({"step": torch.tensor(1.0)}), 5)
    native.write_files = failing if rank == 1 else write_files
    try:
        with pytest.raises(CheckpointError, match="No space"):
            manager(root, replicated=False).save(state_dict_of({"step": torch.tensor(2.0)}), 5)
    finally:
        native.write_files = write_files
    found = manager(root, replicated=False)
    assert found.find_latest() == 5
    assert float(found.load()[0].common["step"]) == 1.0


def test_a_failed_save_leaves_an_older_one_of_the_iteration(tmp_path: Path) -> None:
    run_ranks(fail_again, 2, str(tmp_path))


class Unknown:
    """Of no kind that is read."""


def small_state(device: str = "cpu", **common: Any) -> Any:
    kind = compat.import_tensor_aware_state_dict()
    rank = torch.distributed.get_rank()
    weight = compat.ShardedTensor.from_rank_offsets("w", torch.ones(4, device=device), replica_id=rank)
    return kind.from_state_dict({"weight": weight, **common}, algo="atomic")[0]


def refuse(rank: int, root: str) -> list[tuple[str, bool, str]]:
    """Return the name, whether callers of nvidia-resiliency-ext catch it, and the text of each error."""
    saver = manager(root, replicated=False)
    empty = small_state(device="meta")
    actions = [saver.load, lambda: saver.save(empty, 1)]
    saver.find_latest()
    saver.save(small_state(), 2)
    saver.find_latest()
    actions += [
        lambda: saver.load_iteration(7),
        lambda: saver.save(small_state(), 2),
        lambda: saver.save(small_state(unsafe=Unknown()), 3),
    ]
    found = []
    freed = small_state()
    next(iter(freed.tensors)).untyped_storage().resize_(0)
    for action in [*actions[2:], *actions[:2], lambda: saver.save(freed, 4)]:
        if action is actions[0]:
            saver.latest_iteration = -1
        try:
            action()
        except CheckpointError as error:
            catchable = isinstance(error, compat.import_local_checkpointing_error())
            found.append((type(error).__name__, catchable, str(error)))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_errors_are_of_the_kind_that_callers_catch(tmp_path: Path, world_size: int) -> None:
    for found in run_ranks(refuse, world_size, str(tmp_path)):
        assert [kinds for *kinds, _ in found] == [
            ["CheckpointCorruptError", True],
            ["CheckpointMismatchError", True],
            ["UnsafeCheckpointError", True],
            ["CheckpointNotFoundError", True],
            ["CheckpointMismatchError", True],
            ["CheckpointMismatchError", True],
        ]
        assert "w is on the meta device and has no values to save" in found[-2][2]
        assert "its storage has only 0 bytes" in found[-1][2]


def save_and_change_directory(rank: int, root: str) -> None:
    home = os.getcwd()
    os.makedirs(os.path.join(root, "elsewhere"))
    os.chdir(root)
    try:
        saver = manager("local", replicated=False)
        saver.find_latest()
        queue = AsyncCallsQueue()
        os.chdir("elsewhere")
        queue.schedule_async_request(saver.save(small_state(), 1, is_async=True))
        queue.close()
        for thread in saver_threads():
            thread.join()
        assert os.listdir() == []
    finally:
        os.chdir(home)
    assert manager(os.path.join(root, "local"), replicated=False).find_latest() == 1


def test_a_relative_path_keeps_its_meaning(tmp_path: Path) -> None:
    run_ranks(save_and_change_directory, 1, str(tmp_path))
