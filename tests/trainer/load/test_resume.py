# SPDX-License-Identifier: Apache-2.0
"""A resumed run repeats the saved one bit for bit, even on a different number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.checkpointing import maybe_finalize_async_save
from tests.helpers import RankError, run_ranks
from tests.models import FLOPS, Run, Setup, differences, other, seed_everything
from tests.trainer import training
from tests.trainer.load.test_resharding import load_and_save
from tests.trainer.training import ALL

DISTRIBUTED = Setup(bf16=True, distributed=True, layers=2)
RESHARDABLE = Setup(bf16=True, distributed=True, reshardable=True, layers=2)


def save_go_on_and_return(rank: int, setup: Setup, root: str, is_async: bool) -> dict[str, Any]:
    """Save, train on, reseed, load in one process; return differences from the saved run and its future."""
    with Run(setup, save=root, load=root, async_save=is_async, async_strategy="mcore") as run:
        run.train(2)
        run.state.initialize_async_checkpoint_worker()
        run.save()
        saved = run.fingerprint()
        losses = run.train(3)
        future = run.fingerprint()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)

        seed_everything(7)
        run.state.train_state.do_train = not run.state.train_state.do_train
        result = run.load()
        returned = run.fingerprint()
        losses_again = run.train(3)
        return {
            "result": result,
            "wrong": differences(saved, returned),
            "loss": losses_again == losses,
            "future": differences(future, run.fingerprint()),
            "moved": len(differences(saved, future)),
        }


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "ranks, setup",
    [
        pytest.param(1, Setup(), id="1-rank"),
        pytest.param(2, DISTRIBUTED, id="dp2-distributed"),
        pytest.param(2, Setup(tp=2, bf16=True), id="tp2"),
        pytest.param(2, replace(DISTRIBUTED, pp=2), id="pp2"),
    ],
)
def test_a_run_returns_to_where_it_saved(tmp_path: Path, ranks: int, setup: Setup, is_async: bool) -> None:
    for found in run_ranks(save_go_on_and_return, ranks, setup, str(tmp_path), is_async):
        assert found.pop("moved") > 20
        assert found == {"result": (2, FLOPS), "wrong": [], "loss": True, "future": []}


@pytest.mark.parametrize("setup", [DISTRIBUTED, RESHARDABLE, Setup()], ids=["dp", "full", "replicated"])
def test_data_parallel_size_changes(tmp_path: Path, setup: Setup) -> None:
    """1 rank -> 2 data-parallel ranks -> 1 rank, with everything, RNG included."""
    roots = [str(tmp_path / name) for name in ("first", "dp2")]
    run_ranks(training.save_steps, 1, setup, roots[0], 2, {})
    assert run_ranks(load_and_save, 2, setup, roots[0], roots[1]) == [set()] * 2
    (loaded,) = run_ranks(training.load, 1, setup, roots[0], 2, {"load": roots[1]}, {})
    assert loaded.restored == ALL


def load_with_tp2(rank: int, root: str, config: dict[str, Any]) -> Any:
    with Run(Setup(bf16=True, distributed=True, layers=2, tp=2), load=root, **config) as run:
        return run.load()


def test_sharding_that_cannot_change_layout_says_so(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    run_ranks(training.save_steps, 1, DISTRIBUTED, root, 1, {})
    with pytest.raises(RankError) as caught:
        run_ranks(load_with_tp2, 2, root, {})
    assert caught.value.errors == {0: "RuntimeError", 1: "RuntimeError"}
    for fragment in ("(2, 1) vs (1, 1)", "dp_reshardable", "dist_ckpt_optim_fully_reshardable", "load_optim"):
        assert fragment in str(caught.value)
    assert run_ranks(load_with_tp2, 2, root, {"load_optim": False}) == [(1, FLOPS)] * 2


def save_before_the_first_step(rank: int, setup: Setup, root: str) -> list[str]:
    with Run(setup, save=root) as run:
        run.save()
        losses = run.train(3)
        future = run.fingerprint()
    with Run(other(setup), load=root) as run:
        run.train(1)
        assert run.load() == (0, FLOPS)
        assert run.train(3) == losses
        return differences(future, run.fingerprint())


@pytest.mark.parametrize("setup", [Setup(), DISTRIBUTED, RESHARDABLE], ids=["plain", "dp", "full"])
def test_a_run_can_be_saved_before_its_first_step(tmp_path: Path, setup: Setup) -> None:
    assert run_ranks(save_before_the_first_step, 2, setup, str(tmp_path)) == [[], []]
