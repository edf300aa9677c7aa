# SPDX-License-Identifier: Apache-2.0
"""What failed saves leave in memory, through every door: nothing."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import compat
from ckpt_fast.jobs.job import Job
from ckpt_fast.pipeline.save.waves import Waves
from tests.crash.campaigns.doors import DOORS
from tests.helpers import run_ranks
from tests.trainer.save.test_failures import limited_files

pytestmark = pytest.mark.usefixtures("no_fsync")


def fail(rank: int, directory: str, name: str) -> list[int]:
    """Let saves fail as they are written; return how many are in memory after each."""
    door, counts = DOORS[name](), []
    for number in range(1, 5):
        with limited_files(6000), contextlib.suppress(Exception, CheckpointException):
            door.save(directory, float(number))
            pytest.fail("nothing has failed")
        with contextlib.suppress(Exception):
            door.give_up()
        gc.collect()
        counts.append(sum(isinstance(each, Job | Waves) for each in gc.get_objects()))
    return counts


@pytest.mark.parametrize("name", DOORS)
def test_failed_saves_do_not_stay_in_memory(tmp_path: Path, name: str) -> None:
    if name.startswith("local") and not compat.HAVE_RESIL:
        pytest.skip("needs nvidia-resiliency-ext")
    (counts,) = run_ranks(fail, 1, str(tmp_path / "target"), name)
    assert counts[-1] <= counts[0]
