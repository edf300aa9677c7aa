# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written with one version of megatron-core, Python and numpy and read with the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import run_ranks
from tests.interop import cross_stack, saved

REPOSITORY = Path(__file__).resolve().parents[2]
STACKS = [REPOSITORY / ".venv", REPOSITORY / ".venv-b"]


def other_python() -> Path | None:
    """Return the other stack's Python, or None unless both are installed."""
    pythons = [stack / "bin/python" for stack in STACKS if Path(sys.prefix) != stack]
    both = len(pythons) == 1 and pythons[0].exists()
    return pythons[0] if both else None


@pytest.mark.long
@pytest.mark.skipif(other_python() is None, reason="needs both stacks: make venv && make test-b")
def test_each_stack_reads_the_other(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        directory.mkdir()
    run_ranks(saved.save_with_all, 1, cross_stack.SETUP, str(here))
    command = [str(other_python()), "-W", "ignore", "-m", "tests.interop.cross_stack", str(here), str(there)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]

    wrong_there = json.loads(result.stdout)
    (wrong_here,) = run_ranks(cross_stack.read, 1, str(there))
    for wrong in (wrong_there, wrong_here):
        assert wrong.keys() == {"resume", *saved.READERS}
        for by_writer in wrong.values():
            assert by_writer.keys() >= {"ours"}
            assert not any(by_writer.values()), wrong
