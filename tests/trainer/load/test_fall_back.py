# SPDX-License-Identifier: Apache-2.0
"""A damaged checkpoint of any tier is replaced by the newest intact one of any tier; all ranks agree."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import compat
from ckpt_fast.checkpointing import init_checkpointing_context
from tests.helpers import run_ranks
from tests.models import FLOPS, Run, Setup, differences, megatron_on_cpu, other
from tests.trainer.training import error_of

pytest.importorskip("ckpt_fast.doors.local.manager")
pytestmark = pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")

SETUP = Setup()


def config_of(root: str) -> dict[str, Any]:
    return {
        "save": f"{root}/run",
        "load": f"{root}/run",
        "non_persistent_ckpt_type": "local",
        "non_persistent_local_ckpt_dir": f"{root}/local",
    }


def save(rank: int, root: str, persistent: set[int], local: set[int]) -> None:
    """Train up to the newest step; store a fingerprint of each saved step beside it."""
    with megatron_on_cpu(), Run(SETUP, **config_of(root)) as run:
        context = init_checkpointing_context(run.checkpoint)
        for step in range(1, max(persistent | local) + 1):
            run.train(1)
            for tier, steps in (("persistent", persistent), ("local", local)):
                if step in steps:
                    run.save(checkpointing_context=context, non_persistent_ckpt=tier == "local")
            torch.save(run.fingerprint(), f"{root}/{step}_{rank}.pt")


def load(rank: int, root: str, expected: int, config: dict[str, Any]) -> tuple[Any, list[str], str]:
    """Return the outcome of a load, the differences from the expected step, and what was printed.

    Afterwards the run continues and saves locally: the damaged files must not get in the way.
    """
    printed = io.StringIO()
    with megatron_on_cpu(), Run(other(SETUP), **config_of(root), **config) as run:
        context = init_checkpointing_context(run.checkpoint)
        with contextlib.redirect_stdout(printed):
            outcome = error_of(lambda: run.load(checkpointing_context=context))
        wrong = []
        if outcome[0] == "no error":
            wrong = differences(
                torch.load(f"{root}/{expected}_{rank}.pt", weights_only=False), run.fingerprint()
            )
            run.train(6 - expected)
            run.save(checkpointing_context=context, non_persistent_ckpt=True)
    return outcome, wrong, printed.getvalue()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_local(root: Path, step: int, rank: int) -> None:
    (directory,) = root.glob(f"local/**/iter_{step:07d}_{rank}_local")
    flip(max(directory.iterdir(), key=lambda path: path.stat().st_size))


def damage_persistent(root: Path, step: int) -> None:
    (root / f"run/iter_{step:07d}/common.pt").write_bytes(b"")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize(
    ("persistent", "local", "damaged", "expected"),
    [
        ({2, 4}, {5}, {5}, 4),
        ({3}, {5}, {5}, 3),
        ({4}, {3}, {4}, 3),
        ({2, 4}, {5}, {4, 5}, 2),
    ],
    ids=["local-to-persistent", "only-persistent", "persistent-to-local", "both-to-older"],
)
def test_tiers(
    tmp_path: Path, ranks: int, persistent: set[int], local: set[int], damaged: set[int], expected: int
) -> None:
    run_ranks(save, ranks, str(tmp_path), persistent, local)
    for step in damaged:
        if step in local:
            damage_local(tmp_path, step, ranks - 1)
        else:
            damage_persistent(tmp_path, step)
    answers = run_ranks(load, ranks, str(tmp_path), expected, {})
    for outcome, wrong, _ in answers:
        assert outcome == ("no error", str((expected, float(FLOPS))))
        assert wrong == []
    lines = [line for line in answers[0][2].splitlines() if "falling back to" in line]
    assert len(lines) == len(damaged)
    assert f"iteration {expected};" in lines[-1]
    bad = f"rank {ranks - 1}: " if max(damaged) in local else "common.pt"
    assert bad in lines[0]


def test_nothing_else_is_taken_where_nothing_else_is_wanted(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path), {2}, {3})
    damage_local(tmp_path, 3, 1)
    (first, _, _), (second, _, _) = run_ranks(load, 2, str(tmp_path), 2, {"on_corrupt": "raise"})
    assert first == second
    assert first[0] == "CheckpointCorruptError"
    assert "iteration 3" in first[1] and "rank 1: " in first[1]
