# SPDX-License-Identifier: Apache-2.0
"""What ranks do in the tests of saving and loading: train, save, load, and say what came of it."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from tests.models import Run, Setup, differences, other

ALL = {"model", "optimizer", "scheduler", "rng", "train_state"}


class Loaded(NamedTuple):
    """What a load did: which parts of a run are now as saved, and which are as before the load."""

    result: tuple[int, float]
    restored: set[str]
    kept: set[str]


def save_steps(rank: int, setup: Setup, root: str, steps: int, config: dict[str, Any]) -> None:
    """Train ``steps`` steps and save after each; ``config`` are fields of CheckpointConfig."""
    with Run(setup, save=root, **config) as run:
        for step in range(1, steps + 1):
            run.train(1)
            run.save()
            torch.save(run.fingerprint(), _expected(root, step, rank))


def saved_fingerprint(root: str, step: int, rank: int) -> dict[str, Any]:
    """The fingerprint that ``save_steps`` took right after it saved."""
    return torch.load(_expected(root, step, rank), weights_only=False)  # type: ignore[no-any-return]


def load(
    rank: int, setup: Setup, root: str, step: int, config: dict[str, Any], options: dict[str, Any]
) -> Loaded:
    """Load into a run that has trained on its own, and compare with what ``save_steps`` left of ``root``.

    ``config`` are fields of CheckpointConfig, ``options`` arguments of ``load_checkpoint``.
    """
    with Run(other(setup), **config) as run:
        run.train(3)
        before = run.fingerprint()
        result = run.load(**options)
        after = run.fingerprint()
    return Loaded(
        result,
        ALL - parts(differences(saved_fingerprint(root, step, rank), after)),
        ALL - parts(differences(before, after)),
    )


def parts(names: list[str]) -> set[str]:
    """Which parts of a run the names of a fingerprint belong to."""
    rng = ("random", "numpy", "torch", "tracker.")
    return {"rng" if name.startswith(rng) else name.partition(".")[0].rstrip("0123456789") for name in names}


def _expected(root: str, step: int, rank: int) -> str:
    return os.path.join(os.path.dirname(root), f"{os.path.basename(root)}_{step}_{rank}.pt")
