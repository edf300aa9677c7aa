# SPDX-License-Identifier: Apache-2.0
"""Saves and loads that are ended early: by a signal, a deadline or process exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors


def begin(slow_disk: Path, what: str, directory: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.jobs.interrupted", what, str(directory)],
        env={
            **os.environ,
            "LD_PRELOAD": str(slow_disk),
            "CKPT_FAST_FSYNC": "0",
            "CKPT_FAST_CHUNK": "64K",
            "CKPT_FAST_THREADS": "2",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(slow_disk: Path, what: str, directory: Path, **environment: str) -> str:
    process = begin(slow_disk, what, directory, **environment)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


FALLBACK = pytest.param("0", marks=pytest.mark.long)


@pytest.mark.parametrize("native", ["1", FALLBACK])
@pytest.mark.parametrize(
    "what", [*(pytest.param(each, marks=pytest.mark.long) for each in ("rounds", "given_up")), "failing"]
)
def test_interrupted_jobs_leave_nothing(slow_disk: Path, tmp_path: Path, what: str, native: str) -> None:
    run(slow_disk, what, tmp_path / "checkpoint", CKPT_FAST_NATIVE=native, CKPT_FAST_TIMEOUT="1")


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
    slow_disk: Path, tmp_path: Path, what: str, number: signal.Signals, status: int, after: float
) -> None:
    process = begin(slow_disk, what, tmp_path / "checkpoint")
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(after)
    sent = time.monotonic()
    process.send_signal(number)
    left_at, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert float(left_at) - sent < 2  # from there on, the interpreter and torch take their time
    assert "terminate called" not in errors
    left = [path.name for path in tmp_path.glob("checkpoint/*") if what == "one_save"]
    assert ".metadata" not in left and not [name for name in left if "partial" in name]


@pytest.mark.parametrize("what", ["one_failing_save", "one_failing_background_save"])
def test_an_unretrieved_failure_is_logged_twice(slow_disk: Path, tmp_path: Path, what: str) -> None:
    errors = run(slow_disk, what, tmp_path / "checkpoint")
    assert f"the save to {tmp_path}/checkpoint in the background failed: Checkpoint" in errors
    assert f"this process ends, and its save to {tmp_path}/checkpoint had failed: Checkpoint" in errors


@pytest.mark.parametrize("native", ["1", FALLBACK])
def test_a_save_of_torchs_that_nobody_waits_for_is_finished_at_exit(
    slow_disk: Path, tmp_path: Path, native: str
) -> None:
    run(slow_disk, "one_save_of_torchs", tmp_path / "checkpoint", CKPT_FAST_NATIVE=native)
    index = CheckpointIndex(str(tmp_path / "checkpoint"))
    into = torch.zeros(100, 16384)
    load_tensors(index, [TensorRequest("w", into, (0, 0))])
    assert (into == 1).all()
