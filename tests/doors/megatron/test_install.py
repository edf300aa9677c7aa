# SPDX-License-Identifier: Apache-2.0
"""A training loop that builds Megatron-Core's strategies itself, with ours substituted."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, serialization
from megatron.core.dist_checkpointing.strategies import fully_parallel
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

import ckpt_fast
from ckpt_fast import compat
from ckpt_fast.doors import install as installing
from ckpt_fast.doors.megatron.parallel_save import FastParallelSaveWrapper
from ckpt_fast.errors import CheckpointError
from tests.doors.megatron.test_stock_queue import make_queue
from tests.helpers import run_ranks
from tests.interop.saved import values_of, wrong_values
from tests.manifests import manifest_of
from tests.models import Run, Setup, megatron_on_cpu, other

STOCK = (compat.TorchDistSaveShardedStrategy, compat.TorchDistLoadShardedStrategy)
SETUP = Setup(distributed=True, bf16=True)


def defaults() -> dict[str, type]:
    """Return what Megatron-Core, and a module that imported its names, would build now."""
    strategy = serialization.get_default_save_sharded_strategy()
    return {
        "by name": type(STOCK[0]("torch_dist", 1)),
        "default": type(strategy),
        "loading": type(STOCK[1]()),
        "wrapper": type(fully_parallel.FullyParallelSaveStrategyWrapper(strategy, None)),
    }


def test_everything_is_put_back() -> None:
    before = defaults()
    assert all(kind.__module__.startswith("megatron.") for kind in before.values())
    with ckpt_fast.install() as installed:
        assert f"{torch_strategies.__name__}.TorchDistSaveShardedStrategy" in installed.changed
        assert all(kind.__module__.startswith("ckpt_fast.") for kind in defaults().values())
        assert (
            torch_strategies.TorchDistSaveShardedStrategy,
            torch_strategies.TorchDistLoadShardedStrategy,
        ) == STOCK
    assert defaults() == before


def test_an_unknown_generation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def async_save(self: Any, sharded_state_dict: Any, checkpoint_dir: str, streams: int) -> None: ...

    monkeypatch.setattr(compat.TorchDistSaveShardedStrategy, "async_save", async_save)
    with pytest.raises(CheckpointError, match=r"does not know .*async_save takes streams. Nothing was"):
        ckpt_fast.install()
    assert type(STOCK[0]("torch_dist", 1)) is STOCK[0]
    assert installing._installed == {}


# --- What Megatron-LM's training does around dist_checkpointing -------------------------------------------


def save_as_trainers_do(run: Run, context: dict[str, Any], directory: str, queue: Any) -> None:
    if torch.distributed.get_rank() == 0:
        os.makedirs(directory)
    torch.distributed.barrier()
    if "save_strategy" not in context:
        strategy = serialization.get_default_save_sharded_strategy("torch_dist")
        strategy.use_cached_ckpt_structure = True
        group = compat.get_pg_collection(run.model).dp_cp
        context["save_strategy"] = fully_parallel.FullyParallelSaveStrategyWrapper(strategy, group, True)
    options: dict[str, Any] = {"async_sharded_save": queue is not None}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"
    request = dist_checkpointing.save(
        run.sharded_state_dict(),
        directory,
        context["save_strategy"],
        content_metadata=run.content_metadata(),
        **options,
    )
    if queue is not None:
        queue.schedule_async_request(request)


def load_as_trainers_do(run: Run, directory: str) -> Any:
    strategy = serialization.get_default_load_sharded_strategy(directory)
    group = compat.get_pg_collection(run.model).dp_cp
    wrapper = fully_parallel.FullyParallelLoadStrategyWrapper(strategy, group)
    return dist_checkpointing.load(run.sharded_state_dict(is_loading=True), directory, wrapper)


def train_save_and_load(rank: int, root: str) -> None:
    """Save three times in one loop, the last two in the background while it trains on; load with both."""
    expected: dict[str, Any] = {}
    with ckpt_fast.install(), Run(SETUP) as run, megatron_on_cpu():
        context: dict[str, Any] = {}
        queue, _ = make_queue("mcore-temporal")
        for step in range(3):
            run._step()
            expected[str(step)] = values_of(run.sharded_state_dict())
            save_as_trainers_do(run, context, os.path.join(root, str(step)), queue if step else None)
        run._step()
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
    for reading in (ckpt_fast.install, ckpt_fast.uninstall):
        with Run(other(SETUP)) as run, megatron_on_cpu():
            reading()
            try:
                for step, values in expected.items():
                    run._step()
                    directory = os.path.join(root, step)
                    assert manifest_of(Path(directory)).files
                    assert wrong_values(values, load_as_trainers_do(run, directory)) == []
                    assert dist_checkpointing.load_content_metadata(directory) == run.content_metadata()
            finally:
                ckpt_fast.uninstall()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_that_builds_strategies_itself(tmp_path: Path, world_size: int) -> None:
    run_ranks(train_save_and_load, world_size, str(tmp_path))


# --- A structure that is said to be constant, and is not ---------------------------------------------------


def save_more_and_more(rank: int, root: str) -> list[bool]:
    """With everything cached: rank 1 has a new tensor in the third save, all ranks in the fourth."""
    strategy = ckpt_fast.FastSaveStrategy(cached_metadata=True)
    wrapper = FastParallelSaveWrapper(strategy, None, do_cache_distribution=True)
    reused = []
    for step in range(5):
        state = {
            name: ShardedTensor.from_rank_offsets(name, torch.full((4,), float(step)), replica_id=rank)
            for name in ("a", "b", *(["everywhere"] if step > 2 else []))
        }
        if rank == 1 and step > 1:
            state["new"] = ShardedTensor.from_rank_offsets("new", torch.full((2,), float(step)))
        directory = os.path.join(root, str(step))
        os.makedirs(directory, exist_ok=True)
        torch.distributed.barrier()
        before = wrapper.cached_distribution
        dist_checkpointing.save(state, directory, wrapper, validate_access_integrity=False)
        reused.append(wrapper.cached_distribution is before)
    return reused


def test_a_changed_structure_on_one_rank_replans_all(tmp_path: Path) -> None:
    answers = run_ranks(save_more_and_more, 2, str(tmp_path))
    assert answers == [[False, True, False, False, True]] * 2
    strategy = ckpt_fast.FastLoadStrategy()
    for step, names in enumerate(["ab", "ab", "abn", "aben", "aben"]):
        directory = str(tmp_path / str(step))
        found = strategy.load_tensors_metadata(directory)
        assert "".join(sorted(name[0] for name in found)) == names
        loaded = strategy.load(
            {
                name: ShardedTensor.from_rank_offsets(name, torch.zeros(entry.global_shape))
                for name, entry in found.items()
            },
            directory,
        )
        assert all((tensor == step).all() for tensor in loaded.values())
