# SPDX-License-Identifier: Apache-2.0
"""Training that goes on after failed background saves: what is left, what is said, what comes next."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_fast.callbacks import CallbackManager
from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.jobs import untold
from tests.helpers import run_ranks
from tests.models import FLOPS, Run, Setup
from tests.trainer import training
from tests.trainer.save.failing import faults
from tests.trainer.training import ALL, iterations, tracked

SETUP = Setup(bf16=True, distributed=True)
GOING_ON: dict[str, Any] = {
    "async_save": True,
    "async_strategy": "mcore",
    "on_save_failure": "continue",
    "ckpt_assume_constant_structure": True,
}


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    monkeypatch.setenv("CKPT_FAST_RETRIES", "0")


def poll(run: Run) -> None:
    """Finalize as a training loop does, until nothing is in flight."""
    while run.state.async_calls_queue.get_num_unfinalized_calls():
        maybe_finalize_async_save(run.state, run.checkpoint)


def fail_in_the_middle(rank: int, root: str, fault: str) -> dict[str, Any]:
    """Save iterations 1 to 4; let those of 2 and 3 fail. Return what was printed, and what callbacks got."""
    failed: list[tuple[int, str]] = []
    manager = CallbackManager()
    manager.register(
        "on_checkpoint_save_failed",
        lambda context: failed.append((context.failed_saves, type(context.save_error).__name__)),
    )
    printed, context = io.StringIO(), {}
    with Run(SETUP, save=root, **GOING_ON) as run:
        run.state.initialize_async_checkpoint_worker()
        for step in (1, 2, 3, 4):
            run.train(1)
            breaking = faults.FAULTS[fault](rank, root, step) if step in (2, 3) else contextlib.nullcontext()
            with breaking, contextlib.redirect_stdout(printed):
                run.save(checkpointing_context=context, callback_manager=manager)
                poll(run)
            if step in (2, 3):
                assert tracked(root) == (1, 1)
            torch.save(run.fingerprint(), training._expected(root, step, rank))
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
    return {"printed": printed.getvalue(), "failed": failed, "untold": dict(untold._failures)}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_training_goes_on(tmp_path: Path, fault: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root, report = str(tmp_path / "run"), tmp_path / "report.jsonl"
    monkeypatch.setenv("CKPT_FAST_METRICS", str(report))
    results = run_ranks(fail_in_the_middle, ranks, root, fault)
    for result in results:
        assert [count for count, _ in result["failed"]] == [1, 2]
        assert result["failed"] == results[0]["failed"]
        assert result["untold"] == {}
    warnings = [line for line in results[0]["printed"].splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 2, results[0]["printed"]
    for number, (line, step) in enumerate(zip(warnings, (2, 3), strict=True), 1):
        for text in (faults.CAUSES[fault], "rank ", f"iter_{step:07d}", "newest checkpoint is "):
            assert text in line
        assert f"{root}/iter_0000001. Failed saves in a row: {number} of 3 allowed." in line
    for result in results[1:]:
        assert "WARNING" not in result["printed"]

    lines = [json.loads(line) for line in report.read_text().splitlines()]
    for rank in range(ranks):
        errors = [line["error"] for line in lines if line["rank"] == rank]
        assert [error is None for error in errors] == [True, False, False, True]
        assert faults.CAUSES[fault] in errors[1]

    # A thread that hung may have left something; without trackers, all the rest is there.
    assert tracked(root) == (4, 4)
    if fault not in ("hanging", "unpublished"):
        assert iterations(root) == [1, 4]
    for step in (1, 4):
        for loaded in run_ranks(
            training.load, ranks, SETUP, root, step, {"load": root, "ckpt_step": step}, {}
        ):
            assert (loaded.result, loaded.restored) == ((step, FLOPS), ALL)


def fail_always(
    rank: int, root: str, fault: str, config: dict[str, Any]
) -> tuple[list[tuple[str, str]], int]:
    """Save until that raises; return the errors of this and of one more, and the iteration that raised."""
    errors = []
    with Run(SETUP, save=root, **GOING_ON, **config) as run:
        run.state.initialize_async_checkpoint_worker()

        def save() -> None:
            run.train(1)
            step = run.state.train_state.step
            with faults.FAULTS[fault](rank, root, step):
                run.save()
                poll(run)

        while not errors:
            error = training.error_of(save)
            errors += [error] if error[0] != "no error" else []
        step = run.state.train_state.step
        errors.append(training.error_of(save))
        # Whoever goes on nevertheless, and then succeeds, begins to count anew.
        run.train(1)
        run.save()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
    return errors, step


@pytest.mark.parametrize(("config", "most"), [({}, 3), ({"max_failed_saves": 1}, 1)])
@pytest.mark.parametrize("fault", ["disk_full", "no_directory"])
def test_too_many_in_a_row(tmp_path: Path, fault: str, config: dict[str, Any], most: int) -> None:
    first, second = run_ranks(fail_always, 2, str(tmp_path / "run"), fault, config)
    assert first == second
    errors, step = first
    assert step == most + 1
    for count, (kind, text) in enumerate(errors, most + 1):
        assert kind == ("AsyncSaveError" if fault == "disk_full" else "CheckpointWriteError")
        assert f"{count} background saves in a row failed, more than max_failed_saves={most} allows" in text
        assert faults.CAUSES[fault] in text


def alternate(rank: int, root: str) -> None:
    """Let every other save fail."""
    with Run(SETUP, save=root, max_failed_saves=1, **GOING_ON) as run:
        run.state.initialize_async_checkpoint_worker()
        for step in range(1, 9):
            run.train(1)
            with faults.disk_full(rank, root, step) if step % 2 else contextlib.nullcontext():
                run.save()
                poll(run)
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)


def test_a_save_that_succeeds_resets_the_count(tmp_path: Path) -> None:
    run_ranks(alternate, 2, str(tmp_path / "run"))
    assert iterations(str(tmp_path / "run")) == [2, 4, 6, 8]


def fail_last(rank: int, root: str, how: str, fault: str) -> list[tuple[str, str]]:
    """Let the last save fail; return what the last calls raise."""
    config = {**GOING_ON, "on_save_in_progress": "queue"}
    with Run(SETUP, save=root, **config) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        with faults.FAULTS[fault](rank, root, 1):
            run.save()
            if how == "found out before":
                poll(run)
            if how == "not the last one":
                poll(run)
                run.train(1)

            def end() -> None:
                maybe_finalize_async_save(
                    run.state, run.checkpoint, blocking=how != "not blocking", terminate=True
                )

            if how != "not the last one":
                return [training.error_of(end), training.error_of(end)]
        run.save()
        return [training.error_of(end), training.error_of(end)]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("how", ["in flight", "not blocking", "found out before"])
def test_the_last_save_raises(tmp_path: Path, how: str, ranks: int) -> None:
    results = run_ranks(fail_last, ranks, str(tmp_path / "run"), how, "disk_full")
    for error, again in results:
        training.require(error, "AsyncSaveError", "File too large")
        assert ("training went on without it" in error[1]) == (how == "found out before")
        assert again == ("no error", "None")


def test_the_last_save_whose_call_failed_raises(tmp_path: Path) -> None:
    for error, again in run_ranks(fail_last, 2, str(tmp_path / "run"), "found out before", "no_directory"):
        training.require(error, "CheckpointWriteError", "the last save of the run failed", "directory")
        assert again == ("no error", "None")


def test_an_earlier_one_does_not(tmp_path: Path) -> None:
    ended = [("no error", "None")] * 2
    assert run_ranks(fail_last, 2, str(tmp_path / "run"), "not the last one", "disk_full") == [ended] * 2


def raise_by_default(rank: int, root: str, config: dict[str, Any]) -> tuple[str, str]:
    """Return what a loop raises where a background save fails."""
    with Run(SETUP, save=root, **{**GOING_ON, "on_save_failure": None, **config}) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        with faults.disk_full(rank, root, 1):
            run.save()
            return training.error_of(lambda: poll(run))


@pytest.mark.parametrize(
    ("variable", "config", "raises"),
    [
        (None, {}, True),
        ("raise", {}, True),
        ("continue", {}, False),
        ("continue", {"on_save_failure": "raise"}, True),
        ("raise", {"on_save_failure": "continue"}, False),
        ("continue", {"on_save_error": "warn"}, False),
    ],
)
def test_the_field_goes_before_the_variable(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    config: dict[str, Any],
    raises: bool,
) -> None:
    if variable is not None:
        monkeypatch.setenv("CKPT_FAST_ON_SAVE_FAILURE", variable)
    for kind, _ in run_ranks(raise_by_default, 2, str(tmp_path / "run"), config):
        assert kind == ("AsyncSaveError" if raises else "no error")


def fail_with_a_foreign_configuration(rank: int, root: str) -> tuple[int, tuple[str, str]]:
    """Use a configuration class that lacks our fields; let two saves fail, and one more."""
    own = ("on_corrupt", "on_save", "max_failed", "verify_on", "load_glu", "host_buffer")
    with Run(SETUP, save=root, async_save=True, async_strategy="mcore") as run:
        fields = vars(run.checkpoint).items()
        run.state.cfg.checkpoint = SimpleNamespace(**{k: v for k, v in fields if not k.startswith(own)})
        run.state.initialize_async_checkpoint_worker()

        def save() -> None:
            run.train(1)
            with faults.disk_full(rank, root, run.state.train_state.step):
                run.save()
                poll(run)

        save()
        save()
        return run.state.async_calls_queue.failures.count, training.error_of(save)


def test_a_configuration_without_the_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_ON_SAVE_FAILURE", "continue")
    monkeypatch.setenv("CKPT_FAST_MAX_FAILED_SAVES", "2")
    for count, error in run_ranks(fail_with_a_foreign_configuration, 2, str(tmp_path / "run")):
        assert count == 2
        training.require(error, "AsyncSaveError", "3 background saves in a row failed")


def save_with(
    rank: int, root: str, config: dict[str, Any], variables: list[dict[str, str]]
) -> tuple[str, str]:
    os.environ.update(variables[rank])
    with Run(SETUP, save=root, **{**GOING_ON, **config}) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        return training.error_of(run.save)


@pytest.mark.parametrize(
    ("config", "variables", "text"),
    [
        ({"on_save_failure": "ignore"}, [{}, {}], "on_save_failure='ignore': use one of raise, continue"),
        ({"max_failed_saves": 0}, [{}, {}], "max_failed_saves=0 is not a positive whole number"),
        ({"max_failed_saves": True}, [{}, {}], "max_failed_saves=True is not a positive whole number"),
        (
            {"on_save_failure": None},
            [{}, {"CKPT_FAST_ON_SAVE_FAILURE": "go on"}],
            "CKPT_FAST_ON_SAVE_FAILURE='go on': use one of raise, continue",
        ),
        (
            {},
            [{"CKPT_FAST_MAX_FAILED_SAVES": "many"}, {}],
            "CKPT_FAST_MAX_FAILED_SAVES='many' is not a positive whole number",
        ),
        (
            {"on_save_failure": None},
            [{"CKPT_FAST_ON_SAVE_FAILURE": "continue"}, {}],
            "rank 0 would go on after up to 3 failed background saves, rank 1 would raise",
        ),
    ],
)
def test_an_invalid_policy_is_refused_on_all_ranks(
    tmp_path: Path, config: dict[str, Any], variables: list[dict[str, str]], text: str
) -> None:
    for error in run_ranks(save_with, 2, str(tmp_path / "run"), config, variables):
        training.require(error, "ValueError", text)
    assert not (tmp_path / "run").exists()


def break_a_state(rank: int, root: str, mistake: Exception) -> tuple[str, str]:
    """Save a state that cannot be saved."""

    def collect(*_: Any, **__: Any) -> None:
        raise mistake

    with Run(SETUP, save=root, **GOING_ON) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        if rank == 0:
            run.optimizer.sharded_state_dict = collect
        return training.error_of(run.save)


@pytest.mark.parametrize("mistake", [ZeroDivisionError("zero"), ConnectionError("a worker died")])
def test_a_mistake_in_the_call_raises(tmp_path: Path, mistake: Exception) -> None:
    """Also one whose error looks like one of storage."""
    for error in run_ranks(break_a_state, 2, str(tmp_path / "run"), mistake):
        training.require(error, "CheckpointError", type(mistake).__name__)


def save_at_once(rank: int, root: str, has_queue: bool) -> tuple[str, str]:
    config = GOING_ON if not has_queue else {**GOING_ON, "async_save": False}
    with Run(SETUP, save=root, **config) as run:
        if has_queue:
            run.state.initialize_async_checkpoint_worker()
        run.train(1)
        with faults.disk_full(rank, root, 1):
            return training.error_of(run.save)


@pytest.mark.parametrize("has_queue", [False, True])
def test_a_synchronous_save_raises(tmp_path: Path, has_queue: bool) -> None:
    for error in run_ranks(save_at_once, 2, str(tmp_path / "run"), has_queue):
        training.require(error, "CheckpointWriteError" if has_queue else "AsyncSaveError", "File too large")


def interrupt(rank: int, root: str, error: type[BaseException]) -> str:
    """Raise ``error`` where a failed save is handled, and where one is finalized."""
    with Run(SETUP, save=root, **GOING_ON) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        manager = CallbackManager()

        def stop(_: Any) -> None:
            raise error("stop")

        manager.register("on_checkpoint_save_failed", stop)
        with faults.disk_full(rank, root, 1):
            run.save(callback_manager=manager)
            try:
                poll(run)
            except BaseException as raised:
                return type(raised).__name__
    return "no error"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interruptions_and_mistakes_of_callbacks_raise(tmp_path: Path, error: type[BaseException]) -> None:
    assert run_ranks(interrupt, 2, str(tmp_path / "run"), error) == [error.__name__] * 2


def lose_a_rank(rank: int, root: str) -> tuple[str, str]:
    logging.disable()
    with Run(SETUP, save=root, **GOING_ON) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        run.save()
        if rank == 1:
            os._exit(0)
        kind, text = training.error_of(lambda: poll(run))
        Path(root, "error").write_text(f"{kind} {text}")
        os._exit(0)


def test_a_lost_rank_ends_training(tmp_path: Path) -> None:
    with contextlib.suppress(AssertionError):
        run_ranks(lose_a_rank, 2, str(tmp_path), fresh=True)
    assert "has lost touch" in (tmp_path / "error").read_text()
