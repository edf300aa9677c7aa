# SPDX-License-Identifier: Apache-2.0
"""What happens to a save that is in flight when the program ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pipeline.layouts import same
from tests.pipeline.save.test_save import assert_not_published, loaded


def run(directory: Path, how: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, "-m", "tests.jobs.exiting", str(directory), how],
        env={**os.environ, "CKPT_FAST_FSYNC": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("how", ["normally", pytest.param("exception", marks=pytest.mark.long)])
def test_one_rank_finishes_its_save(tmp_path: Path, how: str) -> None:
    done = run(tmp_path, how)
    assert done.returncode == (how == "exception"), done.stderr
    assert "finalized" in done.stdout
    assert f"finished the save to {tmp_path}/second while the process was ending" in done.stderr
    expected = torch.zeros(1, 100_000)
    assert same(loaded(tmp_path / "second", "w", torch.ones(1, 100_000)), expected)


@pytest.mark.parametrize("how", ["normally", pytest.param("exception", marks=pytest.mark.long)])
def test_several_ranks_abandon_it_and_report_it(tmp_path: Path, how: str) -> None:
    done = run(tmp_path, how, ranks=2)
    assert (done.returncode != 0) == (how == "exception"), done.stderr
    assert "finalized" not in done.stdout
    message = (
        f"this process ends before the save to {tmp_path}/second was finalized: it is abandoned, and the"
    )
    assert message in done.stderr
    assert_not_published(tmp_path / "second")
    assert (tmp_path / "first" / "metadata.json").exists()


def test_sigterm_is_like_a_crash(tmp_path: Path) -> None:
    """Without a handler of the program's own, nobody can finish it: the previous checkpoint stays."""
    assert run(tmp_path, "SIGTERM").returncode == -signal.SIGTERM
    assert_not_published(tmp_path / "second")
    assert (tmp_path / "first" / "metadata.json").exists()
