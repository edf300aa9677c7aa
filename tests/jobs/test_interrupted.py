# SPDX-License-Identifier: Apache-2.0
"""Saves and loads that are ended early: by a signal, a deadline or process exit."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from tests.forks import Forked, Forks, forks_of
from tests.jobs import interrupted


@pytest.fixture(scope="module")
def forks(slow_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    environment = {
        "LD_PRELOAD": str(slow_disk),
        "CKPT_FAST_FSYNC": "0",
        "CKPT_FAST_CHUNK": "64K",
        "CKPT_FAST_THREADS": "2",
    }
    with forks_of([interrupted.__name__], tmp_path_factory.mktemp("outputs"), environment) as forks:
        yield forks


def begin(forks: Forks, what: str, directory: Path, **environment: str) -> Forked:
    return forks.begin(interrupted.__name__, "main", what, str(directory), **environment)


def run(forks: Forks, what: str, directory: Path, **environment: str) -> str:
    done = begin(forks, what, directory, **environment).wait()
    assert done.status == 0, done.stderr
    return done.stderr


FALLBACK = pytest.param("0", marks=pytest.mark.long)


@pytest.mark.parametrize("native", ["1", FALLBACK])
@pytest.mark.parametrize(
    "what", [*(pytest.param(each, marks=pytest.mark.long) for each in ("rounds", "given_up")), "failing"]
)
def test_interrupted_jobs_leave_nothing(forks: Forks, tmp_path: Path, what: str, native: str) -> None:
    run(forks, what, tmp_path / "checkpoint", CKPT_FAST_NATIVE=native, CKPT_FAST_TIMEOUT="1")


@pytest.mark.parametrize(
    ("what", "number", "status"),
    [
        ("one_save", signal.SIGINT, -signal.SIGINT),
        ("one_load", signal.SIGTERM, 3),
        pytest.param("one_save", signal.SIGTERM, 3, marks=pytest.mark.long),
        pytest.param("one_load", signal.SIGINT, -signal.SIGINT, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("after", [pytest.param(0.05, marks=pytest.mark.long), 0.4])
def test_the_process_ends_as_it_should(
    forks: Forks, tmp_path: Path, what: str, number: signal.Signals, status: int, after: float
) -> None:
    process = begin(forks, what, tmp_path / "checkpoint")
    process.wait_for("begun\n")
    time.sleep(after)
    sent = time.monotonic()
    process.send_signal(number)
    ended, out, errors = process.wait()
    assert ended == status, errors
    # From there on, the interpreter and torch take their time.
    assert float(out.removeprefix("begun\n")) - sent < 2
    assert "terminate called" not in errors
    left = [path.name for path in tmp_path.glob("checkpoint/*") if what == "one_save"]
    assert ".metadata" not in left and not [name for name in left if "partial" in name]


@pytest.mark.parametrize("what", ["one_failing_save", "one_failing_background_save"])
def test_an_unretrieved_failure_is_logged_twice(forks: Forks, tmp_path: Path, what: str) -> None:
    errors = run(forks, what, tmp_path / "checkpoint")
    assert f"the save to {tmp_path}/checkpoint in the background failed: Checkpoint" in errors
    assert f"this process ends, and its save to {tmp_path}/checkpoint had failed: Checkpoint" in errors


@pytest.mark.parametrize("native", ["1", FALLBACK])
def test_a_save_of_torchs_that_nobody_waits_for_is_finished_at_exit(
    forks: Forks, tmp_path: Path, native: str
) -> None:
    run(forks, "one_save_of_torchs", tmp_path / "checkpoint", CKPT_FAST_NATIVE=native)
    index = CheckpointIndex(str(tmp_path / "checkpoint"))
    into = torch.zeros(100, 16384)
    load_tensors(index, [TensorRequest("w", into, (0, 0))])
    assert (into == 1).all()
