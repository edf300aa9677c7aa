# SPDX-License-Identifier: Apache-2.0
"""What happens to a save that is in flight when the program ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.pipeline.layouts import same
from tests.pipeline.save.test_save import assert_not_published, loaded


class Ended(NamedTuple):
    """Exit status and output of a program."""

    status: int
    stdout: str
    stderr: str


def run(directory: Path, how: str, ranks: int = 1) -> list[Ended]:
    """What each rank ends with."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.jobs.exiting", str(directory), how],
            env={**os.environ, "CKPT_FAST_FSYNC": "0", "RANK": str(rank), "WORLD_SIZE": str(ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    return [Ended(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize("how", ["normally", pytest.param("exception", marks=pytest.mark.long)])
def test_one_rank_finishes_its_save(tmp_path: Path, how: str) -> None:
    (done,) = run(tmp_path, how)
    assert done.status == (how == "exception"), done.stderr
    assert "finalized" in done.stdout
    assert f"finished the save to {tmp_path}/second while the process was ending" in done.stderr
    expected = torch.zeros(1, 100_000)
    assert same(loaded(tmp_path / "second", "w", torch.ones(1, 100_000)), expected)


@pytest.mark.parametrize("how", ["normally", pytest.param("exception", marks=pytest.mark.long)])
def test_several_ranks_abandon_it_and_report_it(tmp_path: Path, how: str) -> None:
    message = (
        f"this process ends before the save to {tmp_path}/second was finalized: it is abandoned, and the"
    )
    for done in run(tmp_path, how, ranks=2):
        assert done.status == (how == "exception"), done.stderr
        assert "finalized" not in done.stdout
        assert message in done.stderr
    assert_not_published(tmp_path / "second")
    assert (tmp_path / "first" / "metadata.json").exists()


def test_sigterm_is_like_a_crash(tmp_path: Path) -> None:
    """Without a handler of the program's own, nobody can finish it: the previous checkpoint stays."""
    (done,) = run(tmp_path, "SIGTERM")
    assert done.status == -signal.SIGTERM
    assert_not_published(tmp_path / "second")
    assert (tmp_path / "first" / "metadata.json").exists()
