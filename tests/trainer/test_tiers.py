# SPDX-License-Identifier: Apache-2.0
"""Real runs that go back while recovery checkpoints of what they left are still there."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import compat
from ckpt_fast.checkpointing import init_checkpointing_context
from tests.helpers import run_ranks
from tests.models import Run, Setup, megatron_on_cpu

SETUP = Setup()
both = pytest.mark.parametrize("ranks", [1, 2])


def go_on(
    rank: int, root: str, kind: str, steps: dict[int, str], step: int | None, async_save: bool
) -> tuple[int, str]:
    """Load, and save at these steps, persistently or to recover; return what was loaded, and printed."""
    printed = io.StringIO()
    config: dict[str, Any] = {
        "non_persistent_ckpt_type": kind,
        "non_persistent_local_ckpt_dir": f"{root}-local",
        "async_save": async_save,
        "async_strategy": "mcore",
    }
    with (
        megatron_on_cpu(),
        Run(SETUP, save=root, load=root, ckpt_step=step, **config) as run,
        contextlib.redirect_stdout(printed),
    ):
        context = init_checkpointing_context(run.checkpoint)
        run.state.initialize_async_checkpoint_worker()
        loaded, _ = run.load(checkpointing_context=context)
        for at, tier in steps.items():
            run.train(at - run.state.train_state.step)
            run.save(checkpointing_context=context, non_persistent_ckpt=tier == "recovery")
            if async_save:
                from ckpt_fast.checkpointing import maybe_finalize_async_save

                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
    return loaded, printed.getvalue()


class Root:
    """The directory of a run, and how it recovers."""

    def __init__(self, path: Path, kind: str, ranks: int, async_save: bool = False) -> None:
        self.path, self._kind, self._ranks, self._async_save = path, kind, ranks, async_save

    def go_on(self, steps: dict[int, str], step: int | None = None) -> tuple[int, str]:
        """Return the iteration that all ranks have loaded, and what rank 0 printed."""
        answers = run_ranks(go_on, self._ranks, str(self.path), self._kind, steps, step, self._async_save)
        assert {loaded for loaded, _ in answers} == {answers[0][0]}
        return int(answers[0][0]), str(answers[0][1])

    def local(self) -> set[str]:
        return {path.name for path in Path(f"{self.path}-local").rglob("iter_*_local")}


KINDS = [
    "global",
    pytest.param(
        "local", marks=pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")
    ),
]


@both
@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_after_a_roll_back_goes_on_with_the_new_branch(
    tmp_path: Path, kind: str, ranks: int
) -> None:
    """Every save of the new branch is of a lower iteration than the recovery checkpoint of the old one."""
    root = Root(tmp_path / "run", kind, ranks)
    root.go_on({1: "persistent", 5: "recovery"})
    root.go_on({3: "persistent"}, step=1)
    loaded, printed = root.go_on({})
    assert loaded == 3
    tier = "local" if kind == "local" else "recovery"
    assert printed.count("Passed over") == 1 and f"the {tier} one of iteration 5" in printed
    assert root.go_on({4: "recovery"})[0] == 3
    assert root.go_on({})[0] == 4
    if kind == "local":
        assert root.local() == {f"iter_0000004_{rank}_local" for rank in range(ranks)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recovery_checkpoint_is_of_the_new_branch_alone(tmp_path: Path, kind: str) -> None:
    """The trackers name a persistent one that was left."""
    root = Root(tmp_path / "run", kind, 2)
    root.go_on({1: "persistent", 4: "persistent"})
    root.go_on({2: "recovery"}, step=1)
    loaded, printed = root.go_on({3: "recovery"})
    assert loaded == 2 and "the persistent one of iteration 4 (ckpt_step=4 loads it)" in printed
    where = Path(f"{root.path}-local") if kind == "local" else root.path / "non_persistent"
    files = [path for path in where.rglob("*.distcp") if "iter_0000003" in path.parent.name]
    for path in files:
        path.write_bytes(b"")
    assert files
    loaded, printed = root.go_on({})
    assert loaded == (1 if kind == "local" else 2), "what is not of its line is not fallen back to"
    assert "an abandoned branch has left" in printed


@pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")
@pytest.mark.parametrize("async_save", [False, True])
def test_a_local_save_of_the_new_branch_ends_that_of_the_old_one(tmp_path: Path, async_save: bool) -> None:
    """Retention of local checkpoints goes by iteration; an abandoned one would never be older."""
    root = Root(tmp_path / "run", "local", 2, async_save)
    root.go_on({1: "persistent", 5: "recovery"})
    root.go_on({2: "persistent", 3: "recovery"}, step=1)
    assert root.go_on({})[0] == 3
    assert root.local() == {f"iter_0000003_{rank}_local" for rank in range(2)}
