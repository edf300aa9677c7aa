# SPDX-License-Identifier: Apache-2.0
"""What ranks do in the tests of saving and loading: train, save, load, and report the outcome."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.models import Run, Setup, differences, other

ALL = {"model", "optimizer", "scheduler", "rng", "train_state"}


class Loaded(NamedTuple):
    """The outcome of a load: which parts of a run are now as saved, and which as before the load."""

    result: tuple[int, float]
    restored: set[str]
    kept: set[str]


class Loader:
    """A data loader that knows its position."""

    def __init__(self, position: int) -> None:
        self.position = position

    def save_state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def iterator(loader: Any) -> Any:
    return SimpleNamespace(iterable=loader)


def all_ranks(seen: bool) -> bool:
    """Whether all ranks have seen it. They poll together: none may stop while another goes on."""
    everywhere = torch.tensor(int(seen))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere)


def save_steps(
    rank: int, setup: Setup, root: str, steps: int, config: dict[str, Any], with_data: bool = False
) -> None:
    """Train ``steps`` steps and save after each; ``config`` are fields of CheckpointConfig.

    With ``with_data``, also save a data loader's state, different in every step and on every rank ("data" in
    the fingerprint).
    """
    with Run(setup, save=root, **config) as run:
        for step in range(1, steps + 1):
            run.train(1)
            loader = Loader(100 * step + rank)
            run.save(**({"train_data_iterator": iterator(loader)} if with_data else {}))
            position = {"data": loader.position} if with_data else {}
            torch.save({**run.fingerprint(), **position}, _expected(root, step, rank))


def saved_fingerprint(root: str, step: int, rank: int) -> dict[str, Any]:
    """Return the fingerprint that ``save_steps`` took right after it saved."""
    return torch.load(_expected(root, step, rank), weights_only=False)  # type: ignore[no-any-return]


def load(
    rank: int, setup: Setup, root: str, step: int, config: dict[str, Any], options: dict[str, Any]
) -> Loaded:
    """Load into a run that has trained on its own, and compare with the fingerprints of ``save_steps``.

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
    """Return the parts of a run that the names of a fingerprint belong to."""
    rng = ("random", "numpy", "torch", "tracker.")
    return {"rng" if name.startswith(rng) else name.partition(".")[0].rstrip("0123456789") for name in names}


def tracked(root: str) -> tuple[int, int] | None:
    """The iterations that the two trackers name; None without trackers."""
    train_state = Path(root) / "latest_train_state.pt"
    megatron_lm = Path(root) / "latest_checkpointed_iteration.txt"
    if not train_state.exists() and not megatron_lm.exists():
        return None
    return int(torch.load(train_state, weights_only=True)["step"]), int(megatron_lm.read_text())


def iterations(root: str) -> list[int]:
    """Return the iterations that have a directory, in order."""
    return sorted(int(path.name.removeprefix("iter_")) for path in Path(root).glob("iter_*"))


def is_sealed(root: str, step: int) -> bool:
    """Return whether the checkpoint of an iteration is complete."""
    return (Path(root) / f"iter_{step:07d}/metadata.json").exists()


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    """Return type and text of the error that ``action`` raises."""
    try:
        result = action()
    except (Exception, SystemExit) as error:
        return type(error).__name__, str(error)
    return "no error", str(result)


def require(error: tuple[str, str], kind: str, *fragments: str) -> None:
    """Assert that an error has the type and that its text has all the fragments."""
    assert error[0] == kind, error
    assert [fragment for fragment in fragments if fragment not in error[1]] == [], error[1]


def _expected(root: str, step: int, rank: int) -> str:
    return os.path.join(os.path.dirname(root), f"{os.path.basename(root)}_{step}_{rank}.pt")
