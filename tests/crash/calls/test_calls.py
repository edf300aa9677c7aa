# SPDX-License-Identifier: Apache-2.0
"""Each call with which Python or the engine changes the disk fails once, or is the last that happens.

What ``states/test_every_call.py`` does for Python's calls in the pipeline, this does for all calls of the
C library that ``save_checkpoint`` makes, on all ranks together.
"""

from __future__ import annotations

import ctypes
import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_fast import compat
from tests.crash.calls import failing
from tests.crash.calls.failing import Fault, Faults, Findings
from tests.crash.preloading import Ranks, ranks_with
from tests.crash.states.saving import SCENARIOS

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler makes the faults")

FAULTS = {"EIO": Fault(errno.EIO), "ENOSPC": Fault(errno.ENOSPC), "end": Fault(errno.EIO, ends=True)}
NAMES = [
    "first",
    "later",
    "background",
    "background-in-waves",
    "again",
    "background-again",
    "several-files",
    "recovery",
    "recovery-again",
    "local",
    "background-local",
    "fallback-again",
]
# A few of their points are enough to see that faults reach the engine.
FEW = [("background-in-waves", 1, "ENOSPC"), ("again", 2, "EIO"), ("local", 1, "end")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Yield ``run_ranks`` with the faults preloaded."""
    directory = tmp_path_factory.mktemp("faults")
    (directory / "faults").write_bytes(bytes(ctypes.sizeof(Faults)))
    source, faults = Path(__file__).with_name("faults.c"), str(directory / "faults")
    with ranks_with(source, directory, CRASH_FAULTS=faults) as run:
        yield run


def fail(
    ranks: Ranks, place: Path, name: str, world_size: int, fault: str, step: int, limit_s: float
) -> Findings:
    if SCENARIOS[name].is_local and not compat.HAVE_RESIL:
        pytest.skip("needs nvidia-resiliency-ext")
    arguments = (name, str(place), FAULTS[fault], step)
    found: Findings = ranks(failing.fail_at_every_call, world_size, *arguments, timeout_s=limit_s)[0]
    sys.stdout.write(f"{name}, {world_size} ranks, {fault}: {found.points} of {found.calls} calls\n")
    for outcome, count in sorted(found.outcomes.items()):
        sys.stdout.write(f"  {count:4d} {outcome}\n")
    return found


@pytest.mark.long
@pytest.mark.parametrize(("name", "world_size", "fault"), FEW)
def test_some_calls_fail(ranks: Ranks, tmp_path: Path, name: str, world_size: int, fault: str) -> None:
    found = fail(ranks, tmp_path, name, world_size, fault, step=11, limit_s=250)
    assert found.failures == [] and found.points >= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_every_call_fails(ranks: Ranks, tmp_path: Path, name: str, world_size: int, fault: str) -> None:
    found = fail(ranks, tmp_path, name, world_size, fault, step=1, limit_s=3500)
    assert found.failures == [] and found.points == found.calls > 30
