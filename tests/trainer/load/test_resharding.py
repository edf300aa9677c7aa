# SPDX-License-Identifier: Apache-2.0
"""Loading and saving from layout to layout changes no bit of a weight, a moment or a master weight."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import run_ranks
from tests.interop.saved import read_with_dcp
from tests.models import FLOPS, Run, Setup, differences, identical, other
from tests.trainer import training
from tests.trainer.training import ALL

DENSE = Setup(bf16=True, distributed=True, reshardable=True, layers=2)
EXPERTS = replace(DENSE, experts=4)

# (ranks, setup): each is loaded from the previous one. The data-parallel size is what the other parallel
# sizes leave of the ranks.
Layout = tuple[int, Setup]
ON_TWO_RANKS: dict[str, list[Layout]] = {
    "dense": [
        (1, DENSE),
        (2, replace(DENSE, tp=2)),
        (2, replace(DENSE, pp=2)),
        (2, DENSE),
        (1, DENSE),
    ],
    "experts": [(1, EXPERTS), (2, replace(EXPERTS, ep=2)), (2, EXPERTS), (1, EXPERTS)],
}
ON_FOUR_RANKS: dict[str, list[Layout]] = {
    "dense": [
        (1, DENSE),
        (4, replace(DENSE, tp=4)),
        (4, replace(DENSE, tp=2, pp=2)),
        (4, DENSE),
        (4, replace(DENSE, tp=2)),
        (4, replace(DENSE, pp=2)),
        (2, DENSE),
    ],
    "experts": [
        (2, replace(EXPERTS, ep=2)),
        (4, replace(EXPERTS, ep=2)),
        (4, replace(EXPERTS, ep=2, pp=2)),
        (4, replace(EXPERTS, ep=4)),
        (1, EXPERTS),
    ],
}


def load_and_save(rank: int, setup: Setup, source: str, target: str) -> set[str]:
    """Load and save again without training; return the parts that the load left unchanged."""
    with Run(other(setup), load=source, save=target) as run:
        run.train(3)
        before = run.fingerprint()
        assert run.load() == (2, FLOPS)
        run.save()
        return ALL - training.parts(differences(before, run.fingerprint()))


def wander(layouts: list[Layout], directory: Path) -> list[set[str]]:
    """Load and save in each layout in turn, after the first; return what each load left unchanged."""
    roots = [str(directory / str(number)) for number in range(len(layouts))]
    run_ranks(training.save_steps, layouts[0][0], layouts[0][1], roots[0], 2, {})
    kept = []
    for (ranks, setup), source, target in zip(layouts[1:], roots, roots[1:], strict=False):
        # A different seed: otherwise the generators would be as saved without being loaded.
        another = replace(setup, seed=int(os.path.basename(target)))
        found = run_ranks(load_and_save, ranks, another, source, target)
        assert all(each == found[0] for each in found)
        kept.append(found[0])
    states = [read_with_dcp(os.path.join(root, "iter_0000002")) for root in roots]
    names = [name for name in states[0] if isinstance(states[0][name], torch.Tensor)]
    assert len(names) > 30
    assert any("exp_avg_sq" in name for name in names)
    for state, layout in zip(states, layouts, strict=True):
        assert [name for name in names if not identical(states[0][name], state[name])] == [], layout
    return kept


def rng_is_kept(before: Layout, after: Layout) -> bool:
    """RNG states belong to (pipeline, tensor) ranks; with expert parallelism, to data-parallel ranks too."""
    (ranks, one), (ranks_after, another) = before, after
    if (one.tp, one.pp) != (another.tp, another.pp):
        return True
    return max(one.ep, another.ep) > 1 and (ranks, one.ep > 1) != (ranks_after, another.ep > 1)


def assert_nothing_moves(layouts: list[Layout], directory: Path) -> None:
    expected = [{"rng"} if rng_is_kept(*pair) else set() for pair in itertools.pairwise(layouts)]
    assert wander(layouts, directory) == expected


@pytest.mark.parametrize("kind", ON_TWO_RANKS)
def test_parallel_sizes_change(tmp_path: Path, kind: str) -> None:
    assert_nothing_moves(ON_TWO_RANKS[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ON_FOUR_RANKS)
def test_parallel_sizes_change_on_four_ranks(tmp_path: Path, kind: str) -> None:
    assert_nothing_moves(ON_FOUR_RANKS[kind], tmp_path)


def load_elsewhere(rank: int, setup: Setup, root: str) -> tuple[str, str]:
    with Run(setup, load=root) as run:
        run.train(1)
        return training.error_of(run.load)


@pytest.mark.parametrize(
    "setup, kind, fragments",
    [
        (
            replace(EXPERTS, reshardable=False),
            "RuntimeError",
            ("EP mismatch", "(2 vs 1", "dp_reshardable", "dist_ckpt_optim_fully_reshardable"),
        ),
        (
            replace(EXPERTS, distributed=False, reshardable=False),
            "CheckpointMismatchError",
            ("expert_model_parallel_size", "load_optim=False"),
        ),
    ],
    ids=["distributed", "replicated"],
)
def test_optimizers_that_do_not_follow_the_experts_say_so(
    tmp_path: Path, setup: Setup, kind: str, fragments: tuple[str, ...]
) -> None:
    root = str(tmp_path / "run")
    run_ranks(training.save_steps, 1, setup, root, 1, {})
    for error in run_ranks(load_elsewhere, 2, replace(setup, ep=2), root):
        training.require(error, kind, *fragments)
