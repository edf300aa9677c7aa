# SPDX-License-Identifier: Apache-2.0
"""What a save and a load say: one line each, in the log or on standard output; errors say what was tried."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast.checkpointing import init_checkpointing_context, maybe_finalize_async_save
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from tests.helpers import run_ranks
from tests.models import Run, Setup, megatron_on_cpu

LOGGER = logging.getLogger("ckpt_fast")
FACTS = r"\d[\d.]* [MG]B of this rank, training held up ([\d.]+) s, durable after ([\d.]+) s \([\d.]+ GB/s\)"


class Records(logging.Handler):
    """Keeps (level, message)."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append((record.levelname, record.getMessage()))

    def at(self, level: str) -> list[str]:
        return [message for name, message in self.kept if name == level]


@contextlib.contextmanager
def logged(level: int = logging.DEBUG) -> Iterator[Records]:
    """Keep what is logged from ``level`` on, as a program that has configured logging would."""
    records = Records()
    LOGGER.addHandler(records)
    LOGGER.setLevel(level)
    try:
        yield records
    finally:
        LOGGER.removeHandler(records)
        LOGGER.setLevel(logging.NOTSET)


def save_and_load(rank: int, directory: str, config: dict[str, Any]) -> tuple[list[Any], list[Any], str, str]:
    """Save twice and load. Return what was logged of the second save and of the load, and what was printed.

    What was printed comes twice: up to a load without logging, and all.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), Run(Setup(), save=directory, load=directory, **config) as run:
        run.state.initialize_async_checkpoint_worker()
        with logged():
            run.train(1)
            run.save()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        run.train(1)
        with logged() as saved:
            run.save()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        with logged() as loaded:
            run.load()
        in_log = printed.getvalue()
        run.load()
    return saved.kept, loaded.kept, in_log, printed.getvalue()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize(
    "config",
    [{}, {"most_recent_k": 5}, {"most_recent_k": 1}, {"async_save": True}],
    ids=["plain", "keep-all", "keep-one", "background"],
)
def test_one_line_each(tmp_path: Path, ranks: int, config: dict[str, Any]) -> None:
    first, *others = run_ranks(save_and_load, ranks, str(tmp_path), config)
    saved, loaded, in_log, printed = first
    (line,) = [message for level, message in saved if level == "INFO"]
    assert re.fullmatch(
        rf"  successfully saved checkpoint from iteration       2 to {tmp_path} \[ t 1/1, p 1/1 \]: {FACTS}",
        line,
    )
    (line,) = [message for level, message in loaded if level == "INFO"]
    assert line.startswith(
        f"  successfully loaded checkpoint from {tmp_path} [ t 1/1, p 1/1 ] at iteration 2: "
    )
    assert f"restored from {tmp_path}/iter_0000002 (persistent): weights, optimizer" in line
    assert re.search(r"; \d[\d.]* [MG]B of this rank in [\d.]+ s \([\d.]+ GB/s\)$", line)
    # Without logging the same line is printed, and nothing besides.
    assert in_log == ""
    assert printed.splitlines()[0].partition(": restored")[0] == line.partition(": restored")[0]
    assert len(printed.splitlines()) == 1
    for saved, loaded, _, printed in others:
        assert [level for level, _ in saved + loaded if level != "DEBUG"] == []
        assert printed == ""


def test_what_is_said_at_debug(tmp_path: Path) -> None:
    ((saved, loaded, _, _),) = run_ranks(
        save_and_load, 1, str(tmp_path), {"async_save": True, "most_recent_k": 1}
    )
    messages = [message for level, message in saved if level == "DEBUG"]
    for text in (
        "saving checkpoint at iteration       2 to",
        "  scheduled an async checkpoint save at iteration       2 to",
        "Unfinalized async checkpoint saves",
        "Checkpoints scheduled for removal",
    ):
        assert len([each for each in messages if each.startswith(text)]) == 1, text
    assert [message for _, message in saved if "removal: []" in message] == []
    assert len([message for _, message in loaded if "auto-detected" in message]) == 1
    assert [message for _, message in saved + loaded if message.startswith(("WARNING", "ERROR"))] == []


def save_without_worker(rank: int, directory: str) -> list[tuple[str, str]]:
    with Run(Setup(), save=directory, async_save=True) as run, logged() as records:
        run.train(1)
        run.save()
        run.train(1)
        run.save()
    return records.kept


def test_a_save_that_is_not_in_the_background_does_not_say_so(tmp_path: Path) -> None:
    (kept,) = run_ranks(save_without_worker, 1, str(tmp_path), fresh=True)
    assert [message for _, message in kept if "scheduled an async" in message] == []
    (warning,) = [message for level, message in kept if level == "WARNING"]
    assert "no queue of background saves" in warning and "initialize_async_checkpoint_worker()" in warning
    lines = [message for level, message in kept if level == "INFO"]
    assert len(lines) == 2
    for line in lines:
        held_up, durable = map(float, re.search(FACTS, line).groups())  # type: ignore[union-attr]
        assert held_up >= durable > 0


def local_save_and_load(rank: int, directory: str) -> list[tuple[str, str]]:
    config = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": f"{directory}/local"}
    with megatron_on_cpu(), Run(Setup(), save=f"{directory}/run", **config) as run, logged() as records:
        context = init_checkpointing_context(run.checkpoint)
        run.train(1)
        run.save(checkpointing_context=context, non_persistent_ckpt=True)
        run.load(checkpointing_context=context)
    return records.kept


def test_local_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("nvidia_resiliency_ext")
    (kept,) = run_ranks(local_save_and_load, 1, str(tmp_path))
    saved, loaded = [message for level, message in kept if level == "INFO"]
    assert re.match(
        rf"  successfully saved local checkpoint from iteration       1 to .* \[ t 1/1, p 1/1 \]: {FACTS}",
        saved,
    )
    assert "successfully loaded checkpoint" in loaded and "(local)" in loaded


# --- The doors -------------------------------------------------------------------------------------------


def test_the_functions_say_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_dict = {"weight": torch.ones(1000)}
    with logged(logging.INFO) as records:
        ckpt_fast.save(state_dict, tmp_path / "a")
        ckpt_fast.load(state_dict, tmp_path / "a")
        ckpt_fast.async_save(state_dict, tmp_path / "b", no_dist=True).result()
    first, loaded, second = records.at("INFO")
    assert re.fullmatch(rf"saved {tmp_path}/a: {FACTS}", first)
    assert re.fullmatch(rf"loaded {tmp_path}/a: [\d.]+ MB of this rank in [\d.]+ s \([\d.]+ GB/s\)", loaded)
    assert re.fullmatch(rf"saved {tmp_path}/b: {FACTS}", second)
    # torch's functions print nothing, so these do not either.
    ckpt_fast.save(state_dict, tmp_path / "c")
    assert capsys.readouterr().out == ""


def test_torch_dcp_says_one_line_each(tmp_path: Path) -> None:
    state_dict = {"weight": torch.ones(1000)}
    with logged(logging.INFO) as records:
        dcp.save(state_dict, storage_writer=ckpt_fast.FastStorageWriter(tmp_path), no_dist=True)
        dcp.load(state_dict, storage_reader=ckpt_fast.FastStorageReader(tmp_path), no_dist=True)
    saved, loaded = records.at("INFO")
    assert re.fullmatch(rf"saved {tmp_path}: {FACTS}", saved)
    held_up, durable = map(float, re.search(FACTS, saved).groups())  # type: ignore[union-attr]
    assert held_up >= durable
    assert loaded.startswith(f"loaded {tmp_path}: ")


# --- Levels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (logging.DEBUG, ["INFO", "WARNING"]),
        (logging.INFO, ["INFO", "WARNING"]),
        (logging.WARNING, ["WARNING"]),
    ],
)
def test_a_program_that_has_chosen_a_level(
    level: int, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from ckpt_fast.ranks.world import print_rank_0, warn_rank_0

    with logged(level) as records:
        print_rank_0("saved")
        warn_rank_0("look")
    assert [name for name, _ in records.kept] == said
    assert capsys.readouterr().out == ""


# --- Errors ----------------------------------------------------------------------------------------------


def save_three(rank: int, directory: str) -> None:
    with Run(Setup(), save=directory) as run:
        for _ in range(3):
            run.train(1)
            run.save()


def load_in_vain(rank: int, directory: str, config: dict[str, Any]) -> tuple[str, str, list[str]]:
    with Run(Setup(), load=directory, **config) as run, logged() as records:
        try:
            run.load()
        except (CheckpointCorruptError, CheckpointNotFoundError) as error:
            return type(error).__name__, str(error), records.at("WARNING")
    return "no error", "", []


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Three checkpoints, of which none is whole."""
    run_ranks(save_three, 1, str(tmp_path))
    for step in (1, 2, 3):
        (tmp_path / f"iter_{step:07d}" / "common.pt").write_bytes(b"")
    return tmp_path


def test_an_error_names_the_older_checkpoints_that_were_tried(damaged: Path) -> None:
    for kind, text, _ in run_ranks(load_in_vain, 2, str(damaged), {}):
        assert kind == "CheckpointCorruptError"
        first, tried, *listed = text.splitlines()
        assert "iter_0000003" in first
        assert tried == "Older checkpoints were tried, and none could be loaded:"
        assert [re.match(r"  (\S+) \(persistent, iteration (\d)\): ", each).groups() for each in listed] == [  # type: ignore[union-attr]
            (f"{damaged}/iter_000000{step}", str(step)) for step in (2, 1)
        ]
    # Rank 0 has warned of each step back, once.
    assert len(run_ranks(load_in_vain, 1, str(damaged), {})[0][2]) == 2


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"on_corrupt": "raise"}, "Older checkpoints were not tried (on_corrupt='raise')."),
        ({"ckpt_step": 2}, "Older checkpoints were not tried: ckpt_step=2 names this one."),
    ],
)
def test_an_error_says_why_none_was_tried(damaged: Path, config: dict[str, Any], why: str) -> None:
    ((_, text, warnings),) = run_ranks(load_in_vain, 1, str(damaged), config)
    assert text.splitlines()[-1] == why
    assert warnings == []


def test_one_checkpoint_that_is_named(damaged: Path) -> None:
    ((_, text, _),) = run_ranks(load_in_vain, 1, str(damaged / "iter_0000002"), {})
    assert text.splitlines()[-1] == "Other checkpoints were not tried: load names this one."
