# SPDX-License-Identifier: Apache-2.0
"""A run is killed repeatedly at random moments; what is published is always complete."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from ckpt_fast import native
from tests.crash.states.scenario import check, train


def run(root: str, implementation: native.Implementation, fsync: bool) -> None:
    """Run until killed."""
    os.environ["CKPT_FAST_FSYNC"] = str(int(fsync))
    with native.using(implementation):
        train(root)


def kill_often(root: Path, kills: int, implementation: native.Implementation, fsync: bool, seed: int) -> int:
    """Start and kill the run repeatedly; return the last published iteration."""
    # Children are forked from a process that has imported torch and has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tests.crash.states.scenario"])
    moments, latest, longest_s = random.Random(seed), 0, 0.25
    for _ in range(kills):
        child = context.Process(target=run, args=(str(root), implementation, fsync))
        child.start()
        time.sleep(moments.uniform(0.02, longest_s))
        assert child.is_alive(), "the run ended by itself"
        child.kill()
        child.join()
        before, latest = latest, check(str(root))
        assert latest >= before, "the tracker went back"
        if latest == before:
            longest_s *= 1.2  # saves take longer on a slow machine
    return latest


@pytest.mark.parametrize(
    ("implementation", "fsync"),
    [("engine", True), pytest.param("engine", False, marks=pytest.mark.long), ("fallback", False)],
)
def test_killed_at_random_moments(tmp_path: Path, implementation: native.Implementation, fsync: bool) -> None:
    assert kill_often(tmp_path, 12, implementation, fsync, seed=1) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("implementation", ["engine", "fallback"])
@pytest.mark.parametrize("seed", range(5))
def test_killed_a_thousand_times(tmp_path: Path, implementation: native.Implementation, seed: int) -> None:
    assert kill_often(tmp_path, 100, implementation, seed % 2 == 0, seed) > 0
