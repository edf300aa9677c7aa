# SPDX-License-Identifier: Apache-2.0
"""docs/quickstart.md: its programs and commands, one after the other, print what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import in_pipe
from tests.cli.test_transcripts import skeleton
from tests.repository.documents.pages import ROOT, blocks, transcript

PAGE = ROOT / "docs" / "quickstart.md"
HOME = "/home/you"


def write_programs(directory: Path) -> None:
    """Put each program of the page under the name that its first line says."""
    for code in blocks(PAGE, "python"):
        (name,) = re.findall(r"\A# (\w+\.py)$", code, re.M)
        (directory / name).write_text(code)


def run(command: str, directory: Path) -> str:
    """Return what a command prints in a directory, which is the current one, as a shell shows it."""
    words = shlex.split(command)
    settings = dict(word.split("=") for word in words if re.match(r"[A-Z_]+=", word))
    program, *arguments = words[len(settings) :]
    if program == "ckpt-fast":
        ran = in_pipe(*arguments)
        return ran.err + ran.out
    assert program == "python"
    process = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    killed = "Killed\n" if process.returncode == -signal.SIGKILL else ""
    return process.stdout.replace(str(directory), HOME) + killed


def in_any_order_of_numbers(text: str) -> list[str]:
    """The lines without their numbers, each once.

    How many there are depends on what was saved in time, and so does which of them were saved by a run that
    was resumed, which is a number more.
    """
    return list(dict.fromkeys(re.sub(r"\b0( 0)+\b", "0", line) for line in skeleton(text)))


def test_the_page_shows_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_programs(tmp_path)
    examples = transcript(PAGE)
    assert len(examples) > 8
    for command, output in examples:
        assert in_any_order_of_numbers(run(command, tmp_path)) == in_any_order_of_numbers(output), command
