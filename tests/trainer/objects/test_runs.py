# SPDX-License-Identifier: Apache-2.0
"""Training runs on an S3 server: every door, in the foreground and background, on one and two ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from ckpt_fast import KeepNewest, compat
from ckpt_fast.doors.megatron.torch_dist import FastLoadStrategy, FastSaveStrategy
from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.storage.objects.client import checkpoint_files
from ckpt_fast.tools.listing import prune
from ckpt_fast.trainer.contents import fsdp
from ckpt_fast.trainer.save import publish
from tests.doors.dcp import ranks as dcp_ranks
from tests.helpers import run_ranks
from tests.models import Run, Setup, differences, identical, megatron_on_cpu
from tests.object_server import ObjectServer
from tests.trainer.contents.test_fsdp import Chunk, config, state_of
from tests.trainer.objects.bucket import SETUP, Bucket, new_bucket, resume, train_and_save

TWO_RANKS = [pytest.param(1, marks=pytest.mark.long), 2]


def save_and_resume(rank: int, bucket: Bucket, in_background: bool) -> list[str]:
    with bucket.in_use():
        prints = train_and_save(bucket, 3, async_save=in_background, most_recent_k=2)
        return resume(bucket, prints, 3) + resume(bucket, prints, 2, ckpt_step=2)


@pytest.mark.parametrize("ranks", TWO_RANKS)
@pytest.mark.parametrize(
    "in_background", [pytest.param(False, marks=pytest.mark.long), True], ids=["foreground", "background"]
)
def test_a_run_resumes(object_server: ObjectServer, tmp_path: Path, in_background: bool, ranks: int) -> None:
    bucket = new_bucket(object_server, tmp_path)
    assert run_ranks(save_and_resume, ranks, bucket, in_background) == [[]] * ranks
    assert bucket.tracked() == (3, 3)
    assert bucket.iterations() == bucket.sealed() == [2, 3]
    assert os.listdir(bucket.spool) == []


def save_three(rank: int, bucket: Bucket) -> None:
    with bucket.in_use():
        train_and_save(bucket, 3)


def roll_back(rank: int, bucket: Bucket) -> list[list[int]]:
    """Go on from 2 to 4 and 5, and return what is left after each; 3 was abandoned."""
    left = []
    with bucket.in_use(), Run(SETUP, save=bucket.url, load=bucket.url, ckpt_step=2, most_recent_k=2) as run:
        run.load()
        for steps in (2, 1):
            run.train(steps)
            run.save()
            left.append(bucket.iterations())
    return left


def test_retention_follows_the_line_of_the_run(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path)
    run_ranks(save_three, 1, bucket)
    assert run_ranks(roll_back, 1, bucket) == [[[2, 4], [4, 5]]]
    assert bucket.tracked() == (5, 5)


def prune_before_the_trackers(rank: int, bucket: Bucket) -> list[int]:
    """Go back from 3 to 1, and prune when 2 has been saved again and the trackers have not followed."""
    with bucket.in_use(), Run(SETUP, save=bucket.url, load=bucket.url, ckpt_step=1) as run:
        run.load()
        run.train(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(publish, "publish_trackers", lambda *_: None)
            run.save()
        prune(bucket.url, [KeepNewest(1)])
        return bucket.iterations()


def test_what_the_trackers_are_about_to_name_is_not_pruned(
    object_server: ObjectServer, tmp_path: Path
) -> None:
    bucket = new_bucket(object_server, tmp_path)
    run_ranks(save_three, 1, bucket)
    assert run_ranks(prune_before_the_trackers, 1, bucket) == [[1, 2, 3]]
    assert bucket.tracked() == (3, 3)


def use_strategies(rank: int, bucket: Bucket) -> list[bool]:
    """Save through the strategies at once and as a request, and load both; return whether they are equal."""
    with bucket.in_use(), Run(Setup()) as run:
        run.train(1)
        state = run.sharded_state_dict
        dist_checkpointing.save(state(), f"{bucket.url}/now", FastSaveStrategy())
        later = dist_checkpointing.save(
            state(), f"{bucket.url}/later", FastSaveStrategy(), async_sharded_save=True
        )
        later.execute_sync()
        with megatron_on_cpu():
            found = [
                dist_checkpointing.load(state(True), f"{bucket.url}/{name}", FastLoadStrategy())
                for name in ("now", "later")
            ]
        return [identical(found[0], found[1]), bool(found[0]["optimizer"])]


@pytest.mark.parametrize("ranks", TWO_RANKS)
def test_megatron_core(object_server: ObjectServer, tmp_path: Path, ranks: int) -> None:
    bucket = new_bucket(object_server, tmp_path)
    assert run_ranks(use_strategies, ranks, bucket) == [[True, True]] * ranks
    assert os.listdir(bucket.spool) == []


def save_fsdp(rank: int, bucket: Bucket) -> dict[str, list[str]]:
    """Save at once and in the background; return what differs after loading."""
    with bucket.in_use():
        run = dcp_ranks.Trained(seed=0)
        whole = {name: value.clone() for name, value in dcp_ranks._whole(state_of(run))["model"].items()}
        fsdp.save_fsdp_dtensor(config(), [Chunk()], state_of(run), f"{bucket.url}/now")
        queue = AsyncCallsQueue()
        background = config(async_save=True, save=bucket.url)
        queue.schedule_async_request(
            fsdp.save_fsdp_dtensor(background, [Chunk()], state_of(run), f"{bucket.url}/later")
        )
        dcp_ranks._scramble(state_of(run)["model"])
        queue.maybe_finalize_async_calls(blocking=True)
        wrong = {}
        for name in ("now", "later"):
            scaffold = {**state_of(dcp_ranks.Trained(seed=1), seed=1), "_model": [Chunk()]}
            path = f"{bucket.url}/{name}"
            state, *_ = fsdp.load_fsdp_dtensor_checkpoint(
                bucket.url, background.checkpoint, False, scaffold, None, checkpoint_path_override=path
            )
            wrong[name] = differences(whole, dcp_ranks._whole(state)["model"])
        queue.close()
        return wrong


@pytest.mark.long
@pytest.mark.skipif(not compat.HAVE_MEGATRON_FSDP, reason="needs Megatron FSDP")
@pytest.mark.parametrize("ranks", [1, 2])
def test_fsdp(object_server: ObjectServer, tmp_path: Path, ranks: int) -> None:
    bucket = new_bucket(object_server, tmp_path)
    assert run_ranks(save_fsdp, ranks, bucket) == [{"now": [], "later": []}] * ranks
    assert os.listdir(bucket.spool) == []


def large_files(rank: int, bucket: Bucket) -> list[Any]:
    """Save and load what is uploaded in parts."""
    from ckpt_fast.format.types import TensorRequest, TensorShard
    from ckpt_fast.pipeline.load.index import CheckpointIndex
    from ckpt_fast.pipeline.load.load import load_tensors
    from tests.saves import save

    whole = torch.arange(3 << 20, dtype=torch.float32)
    with bucket.in_use():
        url = f"{bucket.url}/large"
        save([TensorShard("w", whole, (0,), whole.shape)], url, files=checkpoint_files(url), writers=1)
        target = torch.zeros_like(whole)
        with checkpoint_files(url) as files:
            load_tensors(CheckpointIndex(files.directory, files=files), [TensorRequest("w", target, (0,))])
    return [torch.equal(whole, target)]


def test_an_upload_in_parts(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path, multipart_threshold=1 << 20, multipart_chunksize=5 << 20)
    assert run_ranks(large_files, 1, bucket) == [[True]]
    assert sum(request.startswith("PUT") for request in object_server.requests()) > 3
