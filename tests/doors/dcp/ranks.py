# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_ranks`` do: save and load FSDP2 and DTensor states with ours and torch's."""

from __future__ import annotations

import io
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ckpt_fast import FastStorageReader, FastStorageWriter
from tests.doors.dcp.states import differences

WRITERS = {
    "ours": FastStorageWriter,
    "ours-2-files": lambda path: FastStorageWriter(path, thread_count=2),
    "stock": dcp.FileSystemWriter,
}
READERS = {"ours": FastStorageReader, "stock": dcp.FileSystemReader}
# torch 2.6 runs FSDP2's collectives on streams, which only GPUs have.
FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")


class Trained:
    """A sharded model after a step. 13 and 7 rows divide unevenly; of 3, one of 4 ranks gets none."""

    def __init__(self, seed: int) -> None:
        world = dist.get_world_size()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(11, 13), nn.GELU(), nn.Linear(13, 7), nn.GELU(), nn.Linear(7, 3))
        mesh = init_device_mesh("cpu", (world,))
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01 * (seed + 1))
        self.model(torch.randn(4, 11)).pow(2).sum().backward()
        self.optimizer.step()
        self.matrices = matrices(seed)

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "matrices": self.matrices}

    def load(self, reader: Any, **options: Any) -> None:
        state = self.state()
        dcp.load(state, storage_reader=reader, **options)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )

    def whole(self) -> dict[str, Any]:
        """Collective. Return the state as one rank would have it."""
        return _whole(self.state())


def matrices(seed: int) -> dict[str, torch.Tensor]:
    """Return DTensors on one- and two-dimensional meshes, and a plain tensor."""
    world = dist.get_world_size()
    torch.manual_seed(seed + 100)
    columns = 2 if world % 2 == 0 else 1
    grid = init_device_mesh("cpu", (world // columns, columns), mesh_dim_names=("rows", "columns"))
    return {
        "grid": distribute_tensor(torch.randn(5, 9), grid, [Shard(0), Shard(1)]),
        "columns": distribute_tensor(torch.randn(6, 5), grid, [Replicate(), Shard(1)]),
        "twice": distribute_tensor(torch.randn(10, 3), grid, [Shard(0), Shard(0)]),
        "everywhere": distribute_tensor(torch.randn(4, 4), grid, [Replicate(), Replicate()]),
        "scalar": distribute_tensor(torch.tensor(1.5 + seed), grid, [Replicate(), Replicate()]),
        "half": distribute_tensor(torch.randn(33, 2).bfloat16(), grid["rows"], [Shard(0)]),
        "plain": torch.randn(7),
    }


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: _whole(child) for key, child in value.items()}
    return [_whole(child) for child in value] if isinstance(value, list) else value


def wrong(found: dict[str, Any], expected_file: str) -> list[str]:
    return differences(torch.load(expected_file), found)


def save_with_all(rank: int, root: str) -> None:
    """Save the same state with every writer, in both modes, and store it in ``whole.pt``."""
    run = Trained(seed=0)
    whole = run.whole()
    if rank == 0:
        torch.save(whole, f"{root}/whole.pt")
    for name, writer in WRITERS.items():
        dcp.save(run.state(), storage_writer=writer(f"{root}/{name}"))
    future = dcp.async_save(run.state(), storage_writer=FastStorageWriter(f"{root}/async"))
    _scramble(run.state())
    future.result()


def _scramble(value: Any) -> None:
    if isinstance(value, DTensor):
        value.to_local().fill_(-1)
    elif isinstance(value, torch.Tensor):
        value.fill_(-1)
    elif isinstance(value, dict):
        for child in value.values():
            _scramble(child)


def load_all(rank: int, root: str) -> dict[tuple[str, str], list[str]]:
    """Load what every writer wrote with every reader into another run; return the differences."""
    found = {}
    for writer in (*WRITERS, "async"):
        for name, reader in READERS.items():
            run = Trained(seed=1)
            assert found or wrong(run.whole(), f"{root}/whole.pt"), "there is nothing to load"
            run.load(reader(f"{root}/{writer}"))
            found[writer, name] = wrong(run.whole(), f"{root}/whole.pt")
    return found


def cached_plans(rank: int, root: str) -> list[list[str]]:
    """Save four times with plans cached by torch: the third is unchanged, the fourth has a new structure."""
    SavePlanner._cached_save_plan.clear()
    SavePlanner._cached_final_save_plan.clear()
    for cache in ("_cached_all_plans", "_cached_global_plan", "_cached_metadata"):
        getattr(SavePlanner, cache).clear()
    differing = []
    for number in range(4):
        state: dict[str, Any] = {"m": matrices(number), "step": number}
        if number == 3:
            state["m"] = {"other": state["m"]["grid"]}
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        directory = f"{root}/{number}"
        dcp.save(state, storage_writer=FastStorageWriter(directory), planner=planner)
        for reader in READERS.values():
            into: dict[str, Any] = {"m": matrices(9), "step": -1}
            if number == 3:
                into["m"] = {"other": into["m"]["grid"]}
            dcp.load(into, storage_reader=reader(directory))
            differing.append(differences(_whole(state), _whole(into)))
    return differing


def alone(rank: int, root: str) -> list[str]:
    """Save and load several times on one rank, without the others."""
    if rank == 0:
        return []
    state, found = {"w": torch.arange(10)}, {"w": torch.zeros(10, dtype=torch.int64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FastStorageWriter(f"{root}/alone"), no_dist=True)
        dcp.load(found, storage_reader=FastStorageReader(f"{root}/alone"), no_dist=True)
    return differences(state, found)


def without_collectives(rank: int, root: str) -> list[str]:
    """Each rank writes its own metadata to one directory, repeatedly; one rank is later than the other."""
    problems = []
    for step in range(3):
        state = {"w": torch.full((40,), 10 * step + rank), f"only on {rank}": torch.ones(rank + 1)}
        time.sleep(0.3 * (rank == step % 2))
        dcp.save(state, storage_writer=FastStorageWriter(root), use_collectives=False)
        dist.barrier()
        names = {path.name for path in Path(root).iterdir()}
        if names != {"__0.metadata", "__1.metadata", f"__0_{step}.distcp", f"__1_{step}.distcp"}:
            problems.append(f"files of step {step}: {sorted(names)}")
        for name, reader in READERS.items():
            found = {key: torch.zeros_like(value) for key, value in state.items()}
            dcp.load(found, storage_reader=reader(root))
            problems += [f"{name} {step} {key}" for key in differences(state, found)]
    try:
        dcp.save(state, storage_writer=FastStorageWriter(root, overwrite=False), use_collectives=False)
        problems.append("overwritten")
    except Exception as error:
        dist.barrier()  # torch omits it if a rank fails by itself
        if "overwrite is False" not in str(error):
            problems.append(str(error))
    return problems


def modes_in_turn(rank: int, root: str) -> list[list[str]]:
    """Save with and without collectives into one directory; return its contents after each."""
    seen = []
    for use_collectives in (False, True, False):
        state = {"w": torch.full((40,), rank)}
        dcp.save(state, storage_writer=FastStorageWriter(root), use_collectives=use_collectives)
        dist.barrier()
        seen.append(sorted(path.name for path in Path(root).iterdir()))
        dist.barrier()
    return seen


def error_of(action: Any) -> str:
    begin = time.monotonic()
    try:
        action()
    except CheckpointException as error:
        assert time.monotonic() - begin < 20, "the other ranks had to wait"
        return str(error)
    return "no error"


def failing_write(rank: int, root: str) -> list[str]:
    """Let rank 1 fail to write, in both modes: the old checkpoint stays. Then all ranks write."""
    (Path(root) / f"file{rank}").write_text("")
    elsewhere = f"{root}/file{rank}/below" if rank == 1 else f"{root}/checkpoint"
    state = {"m": matrices(0)}
    dcp.save(state, storage_writer=FastStorageWriter(f"{root}/checkpoint"))
    texts = [error_of(lambda: dcp.save(state, storage_writer=FastStorageWriter(elsewhere)))]
    texts.append(
        error_of(lambda: dcp.async_save(state, storage_writer=FastStorageWriter(elsewhere)).result())
    )
    texts.append(str(os.path.exists(f"{root}/checkpoint/.metadata")))
    dist.barrier()
    dcp.save(state, storage_writer=FastStorageWriter(f"{root}/checkpoint"))
    found = {"m": matrices(1)}
    dcp.load(found, storage_reader=FastStorageReader(f"{root}/checkpoint"))
    return [*texts, str(differences(_whole(state), _whole(found)))]


def failing_preparation(rank: int, root: str) -> str:
    (Path(root) / f"file{rank}").write_text("")
    state = {"m": matrices(0)}
    return error_of(lambda: dcp.save(state, storage_writer=FastStorageWriter(f"{root}/file0")))


def failing_snapshot(rank: int, root: str) -> str:
    """Stage a save for which rank 1 has no room; return the error."""
    if rank == 1:
        os.environ["CKPT_FAST_HOST_BUFFER"] = "1"
    state = {"m": matrices(0)}
    return error_of(lambda: dcp.async_save(state, storage_writer=FastStorageWriter(root)).result())


def failing_read(rank: int, root: str) -> str:
    """Load a checkpoint with damage in data that only rank 1 reads; return the error."""
    shards = init_device_mesh("cpu", (2,))
    state = {"w": distribute_tensor(torch.arange(20000), shards, [Shard(0)])}
    dcp.save(state, storage_writer=FastStorageWriter(root))
    if rank == 1:
        path = Path(root) / "__1_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    return error_of(lambda: dcp.load(state, storage_reader=FastStorageReader(root)))


def objects_of_ranks(rank: int, root: str) -> list[str]:
    """Save objects under the same name on all ranks, and a BytesIO under a different name on each."""
    state = {"step": 5, "nested": {"list": [1, {"a": "b"}]}, f"rng.{rank}": io.BytesIO(b"%d" % rank)}
    dcp.save(state, storage_writer=FastStorageWriter(root))
    found: dict[str, Any] = {"step": 0, "nested": {"list": [0, {"a": ""}]}, f"rng.{rank}": None}
    os.environ["CKPT_FAST_ALLOW_PICKLE"] = "1"  # allows the BytesIO
    dcp.load(found, storage_reader=FastStorageReader(root))
    problems = [] if found.pop(f"rng.{rank}").getvalue() == b"%d" % rank else ["rng"]
    del state[f"rng.{rank}"]
    return problems + differences(state, found)


def flipped_bits_read_in_halves(rank: int, root: str) -> int:
    """Flip one bit of a checkpoint of one rank, load half on each of two ranks; count the failed loads."""
    tensor = torch.randn(1024, 300, generator=torch.Generator().manual_seed(0))
    if rank == 0:
        dcp.save({"w": tensor}, storage_writer=FastStorageWriter(root), no_dist=True)
    dist.barrier()
    mesh = init_device_mesh("cpu", (2,))
    path = Path(root, "__0_0.distcp")
    content = path.read_bytes()
    start = content.index(tensor.numpy().tobytes())
    refused = 0
    for number in range(10):
        dist.barrier()
        if rank == 0:
            at = start + tensor.nbytes * number // 10
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << number % 8]) + content[at + 1 :])
        dist.barrier()
        half = distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(number % 2)])
        try:
            dcp.load({"w": half}, storage_reader=FastStorageReader(root))
        except CheckpointException:
            refused += 1
    return refused
