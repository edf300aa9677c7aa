# SPDX-License-Identifier: Apache-2.0
"""Who plans after ``install``: a planner of ours, which lets pass what torch's does, or one of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import ckpt_fast
from ckpt_fast.doors.dcp.planning import columns as column_plans
from tests.doors.dcp.states import blank, differences, odd_tensors, training_state
from tests.doors.installing.test_torch_dcp import is_ours
from tests.helpers import run_ranks
from tests.manifests import find_damage

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


@pytest.fixture(autouse=True)
def forget() -> None:
    column_plans.forget()


def state_of(seed: int) -> dict[str, Any]:
    return {**training_state(seed), "odd": odd_tensors(seed)}


SAVES: dict[str, Callable[[Any, Path], Any]] = {
    "now": lambda state, path: dcp.save(state, checkpoint_id=path),
    "later": lambda state, path: dcp.async_save(state, checkpoint_id=path).result(timeout=60),
    "planner": lambda state, path: dcp.save(state, checkpoint_id=path, planner=dcp.DefaultSavePlanner()),
    "caching": lambda state, path: dcp.save(
        state, checkpoint_id=path, planner=dcp.DefaultSavePlanner(True, True)
    ),
}


@pytest.mark.parametrize("save", SAVES)
def test_no_plan_is_made_twice(save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ckpt_fast.install(megatron=False):
        SAVES[save](state_of(0), tmp_path / "0")

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("planned again")

        for name in ("choose", "describe_state"):
            monkeypatch.setattr(column_plans, name, refuse)
        SAVES[save](state_of(1), tmp_path / "1")
    for seed in (0, 1):
        found = blank(state_of(seed))
        dcp.load(found, checkpoint_id=tmp_path / str(seed))
        assert differences(state_of(seed), found) == []


class Doubling(dcp.DefaultSavePlanner):
    """A planner of a framework."""

    def lookup_object(self, index: Any) -> Any:
        value = super().lookup_object(index)
        return value * 2 if isinstance(value, torch.Tensor) else value


def test_planners_of_others_are_asked(tmp_path: Path) -> None:
    with ckpt_fast.install(megatron=False):
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "now", planner=Doubling())
        dcp.async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "later", planner=Doubling()).result(60)
    for name in ("now", "later"):
        found = {"w": torch.zeros(3)}
        dcp.load(found, checkpoint_id=tmp_path / name)
        assert is_ours(tmp_path / name) and found["w"].tolist() == [2.0, 2.0, 2.0]


def test_a_planner_with_other_storage(tmp_path: Path) -> None:
    class Derived(dcp.FileSystemWriter):
        pass

    expected = state_of(0)
    with ckpt_fast.install(megatron=False):
        dcp.save(expected, storage_writer=Derived(tmp_path), planner=dcp.DefaultSavePlanner())
    assert not is_ours(tmp_path)
    found = blank(expected)
    dcp.load(found, checkpoint_id=tmp_path)
    assert differences(expected, found) == []


# --- What ranks disagree on ---------------------------------------------------------------------------------


def _part(rank: int, dtype: torch.dtype = torch.float32, rows: int = 4) -> DTensor:
    """A rank's two rows of a matrix of ``rows``."""
    mesh = init_device_mesh("cpu", (2,))
    local = torch.full((2, 3), float(rank + 1), dtype=dtype)
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size((rows, 3)), stride=(3, 1)
    )


def _many(rank: int) -> dict[str, Any]:
    """Tensors of many sizes, shards and objects, some on one rank alone, none the same on both."""
    chance, state = Random(5), dict[str, Any](w=_part(rank))
    for number in range(40):
        size, kind = chance.choice([0, 1, 7, 100, 1000]), chance.randrange(8)
        if kind == 0:
            state[f"object {number}"] = ["text", rank, number]
        elif kind < 6 or chance.randrange(2) == rank:
            state[f"tensor {number}"] = torch.full((size,), float(rank), dtype=chance.choice(DTYPES))
    return state


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.uint8]

# What a rank has under one name.
DISAGREEMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "nothing": lambda rank: {"w": torch.ones(3)},
    "values": lambda rank: {"w": torch.full((3,), float(rank))},
    "shapes": lambda rank: {"w": torch.full((3 + rank,), float(rank))},
    "dtypes": lambda rank: {"w": torch.full((3,), rank, dtype=(torch.float32, torch.int64)[rank])},
    "shapes and dtypes": lambda rank: {
        "w": torch.full((5 - rank,), rank, dtype=(torch.int8, torch.half)[rank])
    },
    "dimensions": lambda rank: {"w": torch.ones((3, 1)[: 1 + rank])},
    "an object": lambda rank: {"w": torch.ones(3) if rank else "none"},
    "an object and a number": lambda rank: {"w": torch.tensor(1.0) if rank else 1.0},
    "objects": lambda rank: {"w": "text" if rank else 5},
    "a dict": lambda rank: {"w": torch.ones(3) if rank else {"a": torch.ones(2)}},
    "who has it": lambda rank: {"w": torch.ones(3), **({"x": torch.ones(2)} if rank else {})},
    "sharding": lambda rank: {"w": _part(rank)},
    "the whole of a shard": lambda rank: {"w": _part(rank, rows=4 + 2 * rank)},
    "dtypes of shards": lambda rank: {"w": _part(rank, (torch.float32, torch.half)[rank])},
    "many values": _many,
    "an empty state": lambda rank: {"w": torch.ones(3)} if rank else {},
}
# torch saves it all the same. Its own loads convert what is in another dtype than the first shard.
REFUSED_BY_US_ALONE = {"dtypes of shards"}


def save_what_differs(rank: int, root: str) -> dict[str, tuple[bool, bool, list[str]]]:
    """For each disagreement: whether torch saves it, whether we do, and what is wrong about the files."""
    found = {}
    for number, (name, state_of_rank) in enumerate(DISAGREEMENTS.items()):
        state, saved = state_of_rank(rank), []
        for kind in ("stock", "ours"):
            with ckpt_fast.install(megatron=False, torch_dcp=kind == "ours"):
                try:
                    dcp.save(state, checkpoint_id=f"{root}/{number}-{kind}")
                    saved.append(True)
                except CheckpointException:
                    saved.append(False)
            dist.barrier()
        problems = find_damage(f"{root}/{number}-ours") if saved[1] and rank == 0 else []
        if all(saved) and rank == 0:
            problems += differing(f"{root}/{number}")
        found[name] = (*saved, problems)
    return found


def differing(root: str) -> list[str]:
    """Return what torch and we have saved, if we have not chosen the values that torch has."""
    read = []
    for kind in ("stock", "ours"):
        metadata = dcp.FileSystemReader(f"{root}-{kind}").read_metadata()
        state: dict[str, Any] = {
            name: torch.zeros(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else None
            for name, entry in metadata.state_dict_metadata.items()
        }
        dcp.load(state, checkpoint_id=f"{root}-{kind}", no_dist=True)
        read.append(state)
    stock, ours = read
    return [] if stock.keys() == ours.keys() and not differences(stock, ours) else [f"{stock} != {ours}"]


def test_what_torch_lets_pass(tmp_path: Path) -> None:
    for found in run_ranks(save_what_differs, 2, str(tmp_path)):
        assert [name for name, (_, _, problems) in found.items() if problems] == []
        assert {name for name, (stock, ours, _) in found.items() if stock != ours} == REFUSED_BY_US_ALONE
        assert sum(stock for stock, _, _ in found.values()) > 8


def save_where_one_has_installed(rank: int, root: str, installed: int) -> str:
    installs = ckpt_fast.install(megatron=False, torch_dcp=rank == installed)
    with installs, pytest.raises(CheckpointException) as raised:
        dcp.save({"w": torch.ones(3), f"of {rank}": torch.ones(3)}, checkpoint_id=root)
    return str(raised.value)


@pytest.mark.parametrize("installed", [0, 1])
def test_not_on_every_rank(installed: int, tmp_path: Path) -> None:
    """A mixture never becomes a checkpoint; where ckpt_fast coordinates it can say why."""
    root = tmp_path / "x"
    for message in run_ranks(save_where_one_has_installed, 2, str(root), installed, timeout_s=60):
        assert installed or "call ckpt_fast.install() on every rank" in message
    assert not (root / ".metadata").exists()
