# SPDX-License-Identifier: Apache-2.0
"""Real runs that are resumed and rolled back: retention, fall-back and ``ls`` follow the line they took."""

from __future__ import annotations

import contextlib
import io
import threading
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import KeepBest, KeepEvery, compat
from ckpt_fast.checkpointing import init_checkpointing_context, maybe_finalize_async_save
from ckpt_fast.config import CheckpointConfig, ConfigContainer
from ckpt_fast.pipeline.save import waves
from ckpt_fast.retention.stored import Stored
from ckpt_fast.tools.listing import list_directory
from tests.cli.running import in_pipe
from tests.helpers import run_ranks
from tests.models import Run, Setup, differences, megatron_on_cpu
from tests.trainer.training import error_of, iterations, save_steps, saved_fingerprint, tracked

SETUP = Setup()


def go_on(rank: int, root: str, config: dict[str, Any], steps: list[int]) -> tuple[str, list[str]]:
    """Resume as the configuration says, and save at these steps; return what was printed, and errors."""
    printed, errors = io.StringIO(), []
    before = set(threading.enumerate())
    with Run(SETUP, save=root, load=root, **config) as run, contextlib.redirect_stdout(printed):
        run.state.initialize_async_checkpoint_worker()
        errors.append(error_of(run.load)[1])
        for step in steps:
            run.train(step - run.state.train_state.step)
            run.save()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
    return printed.getvalue(), errors


def resume(root: str, config: dict[str, Any], steps: list[int], ranks: int = 1) -> str:
    return str(run_ranks(go_on, ranks, root, config, steps)[0][0])


@pytest.fixture
def root(tmp_path: Path) -> str:
    """Return the directory of a run with iterations 1 to 3."""
    place = str(tmp_path / "run")
    run_ranks(save_steps, 1, SETUP, place, 3, {})
    return place


def note(root: str, step: int) -> Stored:
    return Stored(step, f"{root}/iter_{step:07d}")


def test_retention_keeps_what_the_run_goes_on_from(root: str) -> None:
    printed = resume(root, {"ckpt_step": 2, "most_recent_k": 2}, [4])
    assert iterations(root) == [2, 4] and tracked(root) == (4, 4)
    assert "abandoned branch, which do not count: ['iter_0000003']" in printed
    assert (note(root, 4).resumed_from, note(root, 2).resumed_from) == (2, None)
    assert resume(root, {"most_recent_k": 2}, [5]) and iterations(root) == [4, 5]
    assert note(root, 5).resumed_from == 4


def test_on_two_ranks_in_the_background(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    run_ranks(save_steps, 2, SETUP, root, 3, {})
    resume(root, {"ckpt_step": 1, "most_recent_k": 2, "async_save": True}, [2, 4], ranks=2)
    assert iterations(root) == [2, 4]
    line = note(root, 4).line
    assert line is not None and line.holds(2, note(root, 2).line) and note(root, 2).resumed_from == 1


def test_what_a_newer_branch_left_stays_and_is_named(root: str) -> None:
    printed = resume(root, {"ckpt_step": 1, "most_recent_k": 1}, [2])
    assert iterations(root) == [2, 3]
    assert "do not count: ['iter_0000003']" in printed
    ran = in_pipe("prune", root, "--keep", "1", "--dry-run")
    assert f"left by an abandoned branch: {root}/iter_0000003" in ran.out
    assert in_pipe("prune", root, "--keep", "1", "--abandoned").status == 0
    assert iterations(root) == [2]


def test_fall_back_follows_the_line(root: str) -> None:
    resume(root, {"ckpt_step": 2}, [4])
    (Path(root) / "iter_0000004/__0_0.distcp").write_bytes(b"")
    printed = resume(root, {}, [])
    assert "falling back to" in printed and "iteration 2;" in printed
    assert f"an abandoned branch has left {root}/iter_0000003" in printed
    assert list_directory(root)[2].is_abandoned
    table = in_pipe("ls", root).out
    assert "resumed from" in table and "abandoned" in table


def load_and_compare(rank: int, root: str, step: int) -> list[str]:
    with Run(SETUP, load=root) as run:
        run.load()
        return differences(saved_fingerprint(root, step, rank), run.fingerprint())


def test_a_checkpoint_with_a_line_is_taken_where_the_trackers_are_lost(root: str) -> None:
    for name in ("latest_train_state.pt", "latest_checkpointed_iteration.txt"):
        (Path(root) / name).unlink()
    assert run_ranks(load_and_compare, 1, root, 3) == [[]]


def go_back_while_saving(rank: int, root: str) -> list[int]:
    """Load iteration 1 while 3 is being written, which keeps one checkpoint when it is published."""
    gate, write = threading.Event(), waves.write

    def held(*arguments: Any) -> Any:
        gate.wait(60)
        return write(*arguments)

    before = set(threading.enumerate())
    with Run(SETUP, save=root, load=root, ckpt_step=1, async_save=True) as run:
        run.state.initialize_async_checkpoint_worker()
        for step in (1, 2, 3):
            run.train(1)
            if step == 3:
                run.checkpoint.most_recent_k = 1
                waves.write = held
            run.save()
            if step < 3:
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        try:
            run.load()
        finally:
            gate.set()
            waves.write = write
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    return iterations(root)


def test_what_a_run_has_just_been_resumed_from_stays(tmp_path: Path) -> None:
    assert run_ranks(go_back_while_saving, 1, str(tmp_path / "run")) == [[1, 3]]


def through_a_local_checkpoint(rank: int, root: str, resumed: bool) -> list[int]:
    """Roll back to 2, and save 4 locally; when resumed, go on from that to 5."""
    config = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": f"{root}-local"}
    step = None if resumed else 2
    with (
        megatron_on_cpu(),
        Run(SETUP, save=root, load=root, ckpt_step=step, most_recent_k=2, **config) as run,
    ):
        context = init_checkpointing_context(run.checkpoint)
        run.load(checkpointing_context=context)
        run.train(1 if resumed else 2)
        run.save(checkpointing_context=context, non_persistent_ckpt=not resumed)
    return iterations(root)


@pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")
def test_the_line_goes_through_local_checkpoints(root: str) -> None:
    assert run_ranks(through_a_local_checkpoint, 1, root, False) == [[1, 2, 3]]
    assert run_ranks(through_a_local_checkpoint, 1, root, True) == [[2, 5]]
    assert note(root, 5).resumed_from == 4


def save_with_metrics(rank: int, root: str, losses: list[float]) -> str:
    context: dict[str, Any] = {}
    policies = [KeepBest(1), KeepEvery(4)]
    with Run(SETUP, save=root, most_recent_k=1, retention=policies) as run:
        for loss in losses:
            run.train(1)
            context["metrics"] = {"loss": loss}
            run.save(checkpointing_context=context)
        context["metrics"] = {"loss": "low" if rank == 0 else 1.0}
        return error_of(lambda: run.save(checkpointing_context=context))[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_policies_of_the_configuration(tmp_path: Path, ranks: int) -> None:
    root = str(tmp_path / "run")
    errors = run_ranks(save_with_metrics, ranks, root, [5.0, 1.0, 3.0, 2.0, 6.0])
    assert all("metrics must be numbers" in each for each in errors)
    assert iterations(root) == [2, 4, 5]
    assert note(root, 2).metrics == {"loss": 1.0}


def test_policies_are_part_of_the_configuration_file(tmp_path: Path) -> None:
    policies = [KeepBest(1, "accuracy", highest=True), KeepEvery(4)]
    config = ConfigContainer(checkpoint=CheckpointConfig(save="x", retention=policies))
    config.to_yaml(str(tmp_path / "run_config.yaml"))
    assert ConfigContainer.from_yaml(str(tmp_path / "run_config.yaml")).checkpoint == config.checkpoint


def test_what_is_no_policy_is_refused_by_name(tmp_path: Path) -> None:
    (outcome,) = run_ranks(refused, 1, str(tmp_path / "run"))
    assert outcome[0] == "ValueError" and "KeepNewest" in outcome[1]


def refused(rank: int, root: str) -> tuple[str, str]:
    with Run(SETUP, save=root, retention=[3]) as run:
        return error_of(run.save)
