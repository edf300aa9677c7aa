# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_ranks`` do."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor import Shard as ShardOf
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ckpt_fast
from ckpt_fast.errors import CheckpointError
from tests.doors.dcp.ranks import Trained, _scramble, _whole, matrices, wrong
from tests.doors.dcp.states import differences

WRITERS = ("ours", "again", "background", "stock")
READERS: dict[str, Callable[[Any, str], None]] = {
    "ours": ckpt_fast.load,
    "stock": lambda state, path: dcp.load(state, storage_reader=dcp.FileSystemReader(path)),
}


def save_with_uneven_groups(rank: int, root: str) -> list[float]:
    """Save in the background through a group of all ranks, one of which is in another group as well."""
    dist.new_group([1])
    everyone = dist.new_group([0, 1])
    ckpt_fast.async_save({"w": torch.ones(3)}, f"{root}/ours", process_group=everyone).result(timeout=60)
    with ckpt_fast.install(megatron=False):
        saved: Any = dcp.async_save(
            {"w": torch.ones(3)}, checkpoint_id=f"{root}/torch", process_group=everyone
        )
        getattr(saved, "upload_completion", saved).result(timeout=60)
    found = {"w": torch.zeros(3)}
    ckpt_fast.load(found, f"{root}/torch", process_group=everyone)
    return list(found["w"].tolist())


def whole_of(state: dict[str, Any]) -> Any:
    """Collective. Return the state as one rank would have it."""
    return _whole(state)


def save_with_all(rank: int, root: str) -> None:
    """Save the same state in all ways, after another of its structure; store it in ``whole.pt``."""
    ckpt_fast.save(Trained(seed=5).state(), f"{root}/ours")
    run = Trained(seed=0)
    whole = run.whole()
    if rank == 0:
        torch.save(whole, f"{root}/whole.pt")
    for name in ("ours", "again"):
        assert "plan" not in ckpt_fast.save(run.state(), f"{root}/{name}").steps
    dcp.save(run.state(), storage_writer=dcp.FileSystemWriter(f"{root}/stock"))
    future = ckpt_fast.async_save(run.state(), f"{root}/background")
    _scramble(run.state())
    future.result()


def load_all(rank: int, root: str) -> dict[tuple[str, str], list[str]]:
    """Load what was saved with every reader into another run; return the differences."""
    found = {}
    for writer in WRITERS:
        for name, load in READERS.items():
            run = Trained(seed=1)
            assert found or wrong(run.whole(), f"{root}/whole.pt"), "there is nothing to load"
            state = run.state()
            load(state, f"{root}/{writer}")
            model, optimizer = state["model"], state["optimizer"]
            set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)
            found[writer, name] = wrong(run.whole(), f"{root}/whole.pt")
    return found


def save_matrices(rank: int, root: str) -> None:
    for seed in (0, 1):
        ckpt_fast.save({"m": matrices(seed), "step": seed}, root)
    whole = whole_of({"m": matrices(1), "step": 1})
    if rank == 0:
        torch.save(whole, f"{root}.pt")


def load_matrices(rank: int, root: str) -> list[list[str]]:
    found = []
    for load in READERS.values():
        state = {"m": matrices(7), "step": 7}
        load(state, root)
        found.append(wrong(whole_of(state), f"{root}.pt"))
    return found


def sharded_tensors(rank: int, root: str) -> list[str]:
    """Save and load FSDP1's kind of tensors: two shards a rank, of nine rows, and rank 1 has none of one."""

    def state(first: int) -> dict[str, Any]:
        values = torch.arange(first, first + 45).view(9, 5)
        starts = [(0, 2), (3, 2)] if rank == 0 else [(2, 1), (5, 4)]
        rows = sharded_tensor.init_from_local_shards(
            [ShardOf.from_tensor_and_offsets(values[s : s + n].clone(), [s, 0], rank) for s, n in starts],
            9,
            5,
        )
        whole = [ShardOf.from_tensor_and_offsets(values.clone(), [0, 0], 0)] if rank == 0 else []
        return {"rows": rows, "whole": sharded_tensor.init_from_local_shards(whole, 9, 5), "step": first}

    def content(value: dict[str, Any]) -> list[Any]:
        shards = [*value["rows"].local_shards(), *value["whole"].local_shards()]
        return [value["step"], *(shard.tensor.tolist() for shard in shards)]

    problems = []
    for first in (100, 200):
        ckpt_fast.save(state(first), f"{root}/ours")
        dcp.save(state(first), storage_writer=dcp.FileSystemWriter(f"{root}/stock"))
        for path in ("ours", "stock"):
            for name, load in READERS.items():
                found = state(0)
                load(found, f"{root}/{path}")
                if content(found) != content(state(first)):
                    problems.append(f"{first} {path} {name}")
    return problems


def replicated(rank: int, root: str) -> tuple[list[int], list[int]]:
    """Save what all ranks have, twice; return the bytes that this rank wrote, and the largest tensors'."""
    sizes = [10, 20, 1000, 30, 4000, 2000, 3000, 40, 5000, 1]
    state: dict[str, Any] = {f"w{number}": torch.full((size,), 1.0) for number, size in enumerate(sizes)}
    state |= {"step": 3, "names": ["a", "b"]}
    written = [ckpt_fast.save(state, f"{root}/{number}").nbytes for number in range(2)]
    found = {name: torch.zeros_like(value) if name[0] == "w" else None for name, value in state.items()}
    ckpt_fast.load(found, f"{root}/1")
    assert differences(state, found) == []
    return written, sizes


def owners_change(rank: int, root: str) -> list[str]:
    """Save tensors that all ranks have, beside one that is large on rank 0, on rank 1, on both or on neither.

    Each rank saves only two structures, in turn. Who saves what depends on what the other one has.
    """
    problems = []
    for turn, large_on in enumerate([{0}, {1}, {0, 1}, set(), {0}, {0, 1}, {1}, set()]):
        own = torch.full((5000 if rank in large_on else 10,), float(rank + turn))
        state = {"a": torch.full((70,), float(turn)), "b": torch.arange(60) + turn, f"own.{rank}": own}
        directory = f"{root}/{turn}"
        ckpt_fast.save(state, directory)
        metadata = dcp.FileSystemReader(directory).read_metadata()
        if metadata.planner_data.keys() != {"a", "b", "own.0", "own.1"}:
            problems.append(f"{turn} has the paths {metadata.planner_data}")
        for name, load in READERS.items():
            found = {key: torch.zeros_like(value) for key, value in state.items()}
            load(found, directory)
            problems += [f"{turn} {name} {key}" for key in differences(state, found)]
    return problems


def error_of(action: Callable[[], Any]) -> str:
    begin = time.monotonic()
    try:
        action()
    except CheckpointError as error:
        assert time.monotonic() - begin < 20, "the other ranks had to wait"
        return f"{type(error).__name__}: {error}"
    return "no error"


class Refusing:
    """An object whose state dict cannot be had on rank 1, nor can it be pickled there."""

    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how = rank, how

    def state_dict(self) -> dict[str, Any]:
        if self.how == "collect" and self.rank == 1:
            raise RuntimeError("no state dict on this rank")
        return {f"{self.how}.{self.rank}": self if self.how == "pickle" and self.rank == 1 else 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing was loaded")

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickling on this rank")


def failing_saves(rank: int, root: str) -> list[str]:
    """Let rank 1 fail in every way; the older checkpoint stays. Then all ranks write."""
    (Path(root) / f"file{rank}").write_text("")
    path = f"{root}/checkpoint"
    elsewhere = f"{root}/file1/below" if rank == 1 else f"{root}/new"
    state: dict[str, Any] = {"m": matrices(0)}
    other = {"m": {**matrices(0), "plain": torch.ones(7 + rank)}}
    ckpt_fast.save(state, path)
    texts = []
    for save in (ckpt_fast.save, lambda *args: ckpt_fast.async_save(*args).result()):
        texts += [
            error_of(lambda save=save: save({**state, "r": Refusing(rank, "collect")}, path)),
            error_of(lambda save=save: save({**state, "r": Refusing(rank, "pickle")}, path)),
            error_of(lambda save=save: save(other, path)),
            error_of(lambda save=save: save(state, elsewhere)),
        ]
    found = {"m": matrices(1)}
    ckpt_fast.load(found, path)
    texts.append(str(differences(whole_of(state), whole_of(found))))
    state = {"m": matrices(2)}
    ckpt_fast.save(state, path)
    ckpt_fast.load(found, path)
    return [*texts, str(differences(whole_of(state), whole_of(found)))]


def failing_loads(rank: int, root: str) -> list[str]:
    """Let rank 1 ask for what is not there, and then read damaged data."""
    mesh = init_device_mesh("cpu", (2,))
    saved = {"w": distribute_tensor(torch.arange(20000), mesh, [Shard(0)]), "v": torch.ones(5), "step": 3}
    ckpt_fast.save(saved, root)
    texts = []
    for change in ({"x": torch.zeros(1)}, {"v": torch.zeros(6)}, {"step": torch.zeros(1)}):
        zeros = distribute_tensor(torch.zeros(20000, dtype=torch.int64), mesh, [Shard(0)])
        state = {"w": zeros, "v": torch.zeros(5), "step": 0} | (change if rank == 1 else {})
        texts.append(error_of(lambda state=state: ckpt_fast.load(state, root)))
        assert not state["w"].to_local().any() and not state["v"].any(), "something was loaded"
    if rank == 1:
        path = Path(root) / "__1_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    state = {**saved, "step": 0}
    texts.append(error_of(lambda: ckpt_fast.load(state, root)))
    assert state["step"] == 0
    return texts


def background_saves(rank: int, root: str) -> list[str]:
    """Overlap saves with each other, with changes, and with collectives of training; none is waited for."""
    problems: list[str] = []
    futures = []
    expected = []
    for number in range(6):
        state = {"m": matrices(number), "step": number}
        expected.append(copy.deepcopy(whole_of(state)))
        time.sleep(0.01 * ((rank + number) % 2))
        futures.append(ckpt_fast.async_save(state, f"{root}/{number % 3}"))
        _scramble(state)
        for _ in range(5):
            total = torch.ones(1000)
            dist.all_reduce(total)
            assert total.eq(dist.get_world_size()).all()
    deadline = time.monotonic() + 60
    while not all(future.done() for future in futures) and time.monotonic() < deadline:
        time.sleep(0.01)
    if rank == 0:  # not collective
        problems += [str(future.exception()) for future in futures if future.exception() is not None]
    dist.barrier()
    for number in range(3, 6):
        found = {"m": matrices(9), "step": 0}
        ckpt_fast.load(found, f"{root}/{number % 3}")
        problems += differences(expected[number], whole_of(found))
    return problems


def subgroups(rank: int, root: str) -> list[str]:
    """Let two pairs of ranks save at the same time, each with a process group of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, pair = groups[rank // 2], rank // 2
    problems = []
    for number in range(3):
        state = {"a": torch.full((1000,), float(number + pair)), "b": torch.ones(1000), f"own.{rank}": rank}
        directory = f"{root}/{pair}"
        if number == 1:
            ckpt_fast.async_save(state, directory, process_group=group).result()
        else:
            ckpt_fast.save(state, directory, process_group=group)
        found = {"a": torch.zeros(1000), "b": torch.zeros(1000), f"own.{rank}": None}
        ckpt_fast.load(found, directory, process_group=group)
        problems += differences(state, found)
    dist.barrier()
    data = sorted(path.name for path in Path(f"{root}/{pair}").glob("*.distcp"))
    return problems + ([] if data == [f"__{2 * pair}_0.distcp", f"__{2 * pair + 1}_0.distcp"] else data)


def alone(rank: int, root: str) -> list[str]:
    """Save and load on each rank without the others, at different times."""
    time.sleep(0.1 * rank)
    state, found = {"w": torch.arange(10) + rank, "step": rank}, {"w": torch.zeros(10).long(), "step": 0}
    for save in (ckpt_fast.save, lambda *args, **named: ckpt_fast.async_save(*args, **named).result()):
        save(state, f"{root}/{rank}", no_dist=True)
        found = {"w": torch.zeros(10, dtype=torch.int64), "step": 0}
        ckpt_fast.load(found, f"{root}/{rank}", no_dist=True)
        assert differences(state, found) == []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = {"w": distribute_tensor(torch.arange(10), mesh, [Shard(0)])}
    whole = {"w": distribute_tensor(torch.arange(10), mesh, [Replicate()])}
    ckpt_fast.save(whole, f"{root}/{rank}", no_dist=True)
    return [error_of(lambda: ckpt_fast.save(sharded, f"{root}/{rank}", no_dist=True))]


def without_room(rank: int, root: str) -> list[str]:
    """Save what the ranks have in common where there is room for it once, and where there is not."""
    real = os.statvfs
    os.statvfs = lambda path: SimpleNamespace(f_blocks=1000, f_bavail=100_000, f_frsize=1)  # type: ignore
    try:
        fits = {str(number): torch.ones(4000) for number in range(4)}
        ckpt_fast.save(fits, f"{root}/fits")
        return [error_of(lambda: ckpt_fast.save({"w": torch.ones(40_000)}, f"{root}/large"))]
    finally:
        os.statvfs = real


def other_saves_seen(rank: int, root: str) -> list[str]:
    """Let the ranks see different saves."""
    directory = f"{root}/{rank}"
    ckpt_fast.save({"w": torch.ones(4)}, directory, no_dist=True)
    link = f"{root}/link{rank}"
    os.symlink(directory, link)
    return [error_of(lambda: ckpt_fast.load({"w": torch.zeros(4)}, link))]
