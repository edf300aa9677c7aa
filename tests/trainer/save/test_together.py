# SPDX-License-Identifier: Apache-2.0
"""Ranks act together: a failure on one is the same error on all, soon, with few collectives."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from ckpt_fast import FastLoadStrategy, FastSaveStrategy
from ckpt_fast.callbacks import Callback, CallbackManager
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.doors.megatron.parallel_save import FastParallelSaveWrapper
from ckpt_fast.pipeline.save.parts import SaveOptions
from tests.helpers import RankError, run_ranks
from tests.models import Run, Setup
from tests.trainer.training import error_of, require, tracked

SETUP = Setup(bf16=True, distributed=True)
_COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast"),
    *("broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter", "scatter"),
    "scatter_object_list",
)
# gloo's own timeout is longer in these tests.
_SOON_S = 20.0


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count what a program calls directly, not nested calls."""
    calls: Counter[str] = Counter()
    depth = 0

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            calls[name] += depth == 0
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1

        return call

    with patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in _COLLECTIVES}):
        yield calls


def count_collectives(rank: int, root: str, setup: Setup) -> dict[str, int]:
    with Run(setup, save=root, ckpt_assume_constant_structure=True) as run:
        context: dict[str, Any] = {}
        run.save(checkpointing_context=context)
        run.train(1)
        with counted() as calls:
            run.save(checkpointing_context=context)
    return {name: count for name, count in calls.items() if count}


@pytest.mark.parametrize("setup", [SETUP, replace(SETUP, tp=2)], ids=["dp 2", "tp 2"])
def test_a_save_of_a_known_structure_makes_seven_collectives(tmp_path: Path, setup: Setup) -> None:
    for calls in run_ranks(count_collectives, 2, str(tmp_path), setup):
        assert sum(calls.values()) <= 7, calls


def fail(rank: int, root: str, what: str) -> tuple[str, str, float]:
    """Save a second time, with a fault on rank 1; return the error, and how long it took."""
    with Run(SETUP, save=root, ckpt_assume_constant_structure=True) as run:
        context: dict[str, Any] = {}
        run.save(checkpointing_context=context)
        run.train(1)
        options = FAILURES[what](rank, run)
        begin = time.monotonic()
        error = error_of(lambda: run.save(checkpointing_context=context, **options))
        return *error, time.monotonic() - begin


def wrong_structure(rank: int, run: Run) -> dict[str, Any]:
    if rank == 1:
        norm = next(each for name, each in run.model[0].named_modules() if name.endswith("final_layernorm"))
        norm.register_buffer("extra", torch.ones(4))
    return {}


class Failing(Callback):  # type: ignore[misc]
    def on_checkpoint_save(self, context: Any) -> None:
        raise OSError("the callback has no room")


def callback(rank: int, run: Run) -> dict[str, Any]:
    """Register a callback on one rank only."""
    manager = CallbackManager()
    if rank == 1:
        manager.add(Failing())
    return {"callback_manager": manager if rank == 1 else None}


def iterator_without_a_state(rank: int, run: Run) -> dict[str, Any]:
    run.state.cfg.dataset = SimpleNamespace(dataloader_save=os.path.join(run.checkpoint.save, "loader"))
    iterable = SimpleNamespace(save_state=lambda: {"at": 3}) if rank == 0 else SimpleNamespace()
    return {"train_data_iterator": SimpleNamespace(iterable=iterable)}


def odd_setting(rank: int, run: Run) -> dict[str, Any]:
    if rank == 1:
        os.environ["CKPT_FAST_HOST_BUFFER"] = "0"
    return {}


FAILURES = {
    each.__name__: each for each in (wrong_structure, callback, iterator_without_a_state, odd_setting)
}


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("wrong_structure", ["rank 0: "]),
        ("callback", ["the callback has no room"]),
        ("iterator_without_a_state", ["rank 1: RuntimeError: Could not find a save_state"]),
        ("odd_setting", ["rank 1: ", "CKPT_FAST_HOST_BUFFER"]),
    ],
)
def test_what_fails_on_one_rank_is_the_same_error_on_both(
    tmp_path: Path, what: str, texts: list[str]
) -> None:
    (kind, message, seconds), (other_kind, other_message, other_seconds) = run_ranks(
        fail, 2, str(tmp_path), what, fresh=True
    )
    assert (kind, message) == (other_kind, other_message)
    require((kind, message), kind, *texts)
    assert kind != "no error"
    assert max(seconds, other_seconds) < _SOON_S


def save_after_one_that_was_refused(rank: int, root: str) -> list[float]:
    """Add a tensor; its first save is refused on rank 1 after rank 0 has planned it."""
    strategy = FastParallelSaveWrapper(FastSaveStrategy(), dist.group.WORLD, do_cache_distribution=True)

    def state(names: str, value: float) -> dict[str, ShardedTensor]:
        return {
            name: ShardedTensor.from_rank_offsets(name, torch.full((50,), value), replica_id=rank)
            for name in names
        }

    def save(names: str, value: float, host_buffer: int | None = None) -> None:
        options = SaveOptions(host_buffer=host_buffer)
        job = torch_dist.start_save(
            state(names, value), root, strategy, options, validate_access_integrity=False
        )
        job.write()
        job.commit()

    save("ab", 1.0)
    refused = error_of(lambda: save("abc", 2.0, host_buffer=0 if rank == 1 else None))
    require(refused, "CheckpointError", "rank 1: ", "a bound of 0 bytes")
    save("abc", 3.0)
    loaded = torch_dist.load(state("abc", 0.0), root)
    return [float(loaded[name][-1]) for name in "abc"]


def test_a_refused_save_caches_no_distribution(tmp_path: Path) -> None:
    for values in run_ranks(save_after_one_that_was_refused, 2, str(tmp_path)):
        assert values == [3.0, 3.0, 3.0]


def lose_a_rank(rank: int, root: str) -> None:
    with Run(SETUP, save=root) as run:
        run.save()
        run.train(1)
        if rank == 1:
            run.optimizer.sharded_state_dict = lambda *_, **__: os._exit(9)  # as if it were killed
        run.save()


def test_a_rank_that_is_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(lose_a_rank, 2, str(tmp_path), fresh=True)
    assert caught.value.errors[0] == "RankLostError"
    assert "rank 0 has lost touch with the other 1 ranks" in str(caught.value)
    assert tracked(str(tmp_path)) == (0, 0)


def load_damaged(rank: int, root: str) -> tuple[str, str]:
    def state(value: float) -> dict[str, ShardedTensor]:
        return {
            key: ShardedTensor.from_rank_offsets(key, torch.full((5000,), value), (0, rank, 2))
            for key in "ab"
        }

    dist_checkpointing.save(state(1.0 + rank), root, FastSaveStrategy())
    dist.barrier()
    if rank == 0:
        path = next(Path(root).glob("__1_0*.distcp"))
        content = bytearray(path.read_bytes())
        content[len(content) // 4] ^= 1
        path.write_bytes(content)
    dist.barrier()
    return error_of(lambda: dist_checkpointing.load(state(0.0), root, FastLoadStrategy()))


def test_no_rank_continues_a_load_that_failed_on_another(tmp_path: Path) -> None:
    first, second = run_ranks(load_damaged, 2, str(tmp_path))
    assert first == second
    require(first, "CheckpointCorruptError", "rank 1: ")
