# SPDX-License-Identifier: Apache-2.0
"""The sharding is validated at the first save, and whenever it has changed on some rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from ckpt_fast import compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.doors.megatron.parallel_save import FastParallelSaveWrapper
from ckpt_fast.doors.megatron.sharding import fingerprint
from ckpt_fast.errors import CheckpointError
from tests.helpers import run_ranks


def sharded(rank: int, value: float, names: str = "ab", twice: bool = False) -> dict[str, Any]:
    """Return rows of one matrix on each rank, and an object; ``twice``: each claims to save the whole."""
    data = torch.full((4, 3), value)
    state: dict[str, Any] = {
        name: ShardedTensor.from_rank_offsets(name, data.clone(), *([] if twice else [(0, rank, 2)]))
        for name in names
    }
    state["object"] = ShardedObject("object", {"value": value}, (2,), (rank,))
    return state


class Saves:
    """Saves of one strategy, which count how often the ranks exchange the descriptions of their shards."""

    def __init__(self, root: str, is_wrapped: bool) -> None:
        self._root, self._number, self.exchanged = root, 0, 0
        strategy: Any = torch_dist.FastSaveStrategy()
        if is_wrapped:
            strategy = FastParallelSaveWrapper(strategy, dist.group.WORLD, do_cache_distribution=True)
        self._strategy = strategy
        self._exchange = compat.determine_global_metadata
        compat.determine_global_metadata = self._count

    def _count(self, *arguments: Any) -> Any:
        self.exchanged += 1
        return self._exchange(*arguments)

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, *_: object) -> None:
        compat.determine_global_metadata = self._exchange

    def save(self, state: dict[str, Any]) -> str:
        """Return the error, or the directory."""
        self._number += 1
        directory = f"{self._root}/{self._number}"
        try:
            job = torch_dist.start_save(state, directory, self._strategy)
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
        job.write()
        job.commit()
        return directory


def save_repeatedly(rank: int, root: str, is_wrapped: bool) -> list[Any]:
    seen: list[Any] = []
    with Saves(root, is_wrapped) as saves:
        for value, names in ((1.0, "ab"), (2.0, "ab"), (3.0, "abc" if rank == 1 else "ab"), (4.0, "abc")):
            before = saves.exchanged
            said = saves.save(sharded(rank, value, names))
            seen.append((saves.exchanged - before, said))
        for number, (value, names) in enumerate(((1.0, "ab"), (2.0, "ab"), (4.0, "abc"))):
            loaded = torch_dist.load(sharded(rank, 0.0, names), seen[(0, 1, 3)[number]][1])
            assert all((loaded[name] == value).all() for name in names)
            assert loaded["object"] == {"value": value}
    return seen


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_the_ranks_exchange_what_has_changed(tmp_path: Path, is_wrapped: bool) -> None:
    """The third save has a tensor on rank 1 alone: half of it is missing, which rank 0 finds."""
    for seen in run_ranks(save_repeatedly, 2, str(tmp_path), is_wrapped):
        assert [exchanged for exchanged, _ in seen] == [1, 0, 1, 1]
        assert seen[2][1].startswith("CheckpointMismatchError: rank 0: nothing was saved")


def fail_and_go_back(rank: int, root: str) -> list[tuple[int, str]]:
    seen = []
    with Saves(root, is_wrapped=False) as saves:
        for twice in (False, True, True, False, False):
            before = saves.exchanged
            said = saves.save(sharded(rank, 1.0, twice=twice))
            seen.append((saves.exchanged - before, said.partition(":")[0]))
        # Valid with what rank 0 had at the failed save, for all that rank 1 knows.
        saves.save(sharded(rank, 1.0, twice=True))
        before = saves.exchanged
        said = saves.save(sharded(rank, 1.0, twice=rank == 1))
        seen.append((saves.exchanged - before, said.partition(":")[0]))
    return seen


def test_what_was_refused_is_refused_again(tmp_path: Path) -> None:
    for seen in run_ranks(fail_and_go_back, 2, str(tmp_path)):
        assert [exchanged for exchanged, _ in seen] == [1, 1, 1, 1, 0, 1]
        assert ["Error" in said for _, said in seen] == [False, True, True, False, False, True]


CHANGES: list[dict[str, Any]] = [
    {"key": "other"},
    {"dtype": torch.bfloat16, "data": None},
    {"local_shape": (2, 3), "data": None},
    {"global_shape": (12, 3), "axis_fragmentations": (3, 1)},
    {"global_offset": (4, 0)},
    {"axis_fragmentations": None},
    {"replica_id": 1},
    {"replica_id": (0, 0, 1)},
    {"allow_shape_mismatch": True},
]


def test_the_fingerprint_tells_every_description_apart() -> None:
    whole = ShardedTensor.from_rank_offsets("w", torch.ones(4, 3), (0, 0, 2))
    others = [dataclasses.replace(whole, **change) for change in CHANGES]
    others.append(ShardedTensor.from_rank_offsets("w", torch.ones(3), (0, 0, 4), prepend_axis_num=1))
    found = [fingerprint({"w": each}) for each in (whole, *others)]
    assert None not in found and len(set(found)) == len(found)
    assert found[0] == fingerprint({"w": dataclasses.replace(whole, data=torch.zeros(4, 3))})
    assert fingerprint({"w": whole, "v": others[0]}) != fingerprint({"v": others[0], "w": whole})
    first, second = (ShardedObject("o", {"n": n}, (2,), (0,)) for n in (1, 2))
    assert fingerprint({"o": first}) == fingerprint({"o": second})
    assert fingerprint({"o": first}) != fingerprint({"o": dataclasses.replace(first, global_offset=(1,))})


@dataclasses.dataclass
class Odd(ShardedObject):  # type: ignore[misc]
    more: Any = dataclasses.field(default_factory=list)


def test_what_cannot_be_told_is_validated() -> None:
    assert fingerprint({"o": Odd("o", 1, (1,), (0,))}) is None
