# SPDX-License-Identifier: Apache-2.0
"""One of two ranks is interrupted during a save and leaves: the other is told, and nothing is torn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.crash.campaigns.two_ranks import Campaign


def check(result: dict[str, Any], moments: int) -> None:
    assert result["failures"] == []
    assert result["interrupted"] > moments // 2


@pytest.mark.long
def test_a_few_lines(tmp_path: Path, no_fsync: None) -> None:
    check(Campaign("pipeline", str(tmp_path)).run("lines", 6), 6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", ["moments", "lines"])
@pytest.mark.parametrize(("door", "moments"), [("pipeline", 100), ("dcp", 100), ("documented", 60)])
def test_many_moments(slow_disk: Path, tmp_path: Path, door: str, what: str, moments: int) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.crash.campaigns.two_ranks",
            door,
            what,
            tmp_path,
            str(moments),
        ],
        env={
            **os.environ,
            "LD_PRELOAD": str(slow_disk),
            "CKPT_FAST_FSYNC": "0",
            "CKPT_FAST_CHUNK": "64K",
            "CKPT_FAST_THREADS": "2",
        },
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    check(result, moments)
    sys.stdout.write(f"{door} {what}: {result}\n")
