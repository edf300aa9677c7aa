# SPDX-License-Identifier: Apache-2.0
"""Whether spools have room for a save of torch DCP to object storage, asked before anything is touched."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import ckpt_fast
from tests.doors.objects.test_dcp import save_in_background
from tests.helpers import run_ranks
from tests.storage.test_space import file_system
from tests.trainer.objects.bucket import Bucket

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.skipif(not hasattr(os, "statvfs"), reason="no statvfs"),
]


def save_what_fits_for_each_alone(rank: int, bucket: Bucket) -> list[str]:
    """Save where the spools' file system has room for either rank's part, and not for both."""
    raised = []
    with bucket.in_use(), ckpt_fast.install(megatron=False):
        for planner in (None, TheirPlanner()):
            for save in (dcp.save, save_in_background):
                for size in (10, 10_000):
                    state = {f"of {rank}": torch.full((size,), 1.0)}
                    with pytest.MonkeyPatch.context() as patch:
                        file_system(patch, free=50_000)
                        try:
                            save(state, checkpoint_id=bucket.url, planner=planner)
                        except CheckpointException as error:
                            raised.append(str(error))
                    dist.barrier()
    return raised


class TheirPlanner(dcp.DefaultSavePlanner):
    """A planner of a framework."""


def test_spools_of_one_file_system_have_room_together(bucket: Bucket) -> None:
    """What would not fit is refused before the older checkpoint is touched."""
    for messages in run_ranks(save_what_fits_for_each_alone, 2, bucket):
        assert len(messages) == 4
        for message in messages:
            assert f"cannot save to {bucket.url}: what passes through the spool on" in message
    with ckpt_fast.install(megatron=False):
        found = {f"of {rank}": torch.zeros(10) for rank in range(2)}
        dcp.load(found, checkpoint_id=bucket.url)
    assert all(bool(tensor.all()) for tensor in found.values())


def save_alone_where_little_fits(rank: int, bucket: Bucket) -> list[bool]:
    """Ranks that save without each other ask for their own part alone; returns which saves were made."""
    saved = []
    with bucket.in_use(), ckpt_fast.install(megatron=False), pytest.MonkeyPatch.context() as patch:
        file_system(patch, free=50_000)
        for size in (10_000, 20_000):
            try:
                state = {"w": torch.ones(size)}
                dcp.save(state, checkpoint_id=f"{bucket.url}/{rank}", no_dist=True)
                saved.append(True)
            except CheckpointException as error:
                saved.append("what passes through the spool" not in str(error))
    return saved


@pytest.mark.skipif("no_dist" not in inspect.signature(dcp.save).parameters, reason="torch knows no no_dist")
def test_room_for_a_rank_that_saves_alone(bucket: Bucket) -> None:
    assert run_ranks(save_alone_where_little_fits, 2, bucket) == [[True, False]] * 2


def test_a_spool_that_cannot_be_made(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before the older checkpoint is touched."""
    state = {"w": torch.ones(3)}
    with ckpt_fast.install(megatron=False):
        dcp.save(state, checkpoint_id=bucket.url)
        before = bucket.keys()
        with monkeypatch.context() as patch:
            patch.setenv("CKPT_FAST_SPOOL", f"{bucket.spool}/none")
            with pytest.raises(CheckpointException, match="cannot create a spool for"):
                dcp.save(state, checkpoint_id=bucket.url)
    assert bucket.keys() == before and any(key.endswith(".metadata") for key in before)
