# SPDX-License-Identifier: Apache-2.0
"""An S3 server that fails for a while, or for good: what is tried again, said, and published."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ckpt_fast import compat
from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.storage import patience
from tests.helpers import RankError, run_ranks
from tests.models import Run
from tests.object_server import Fault, ObjectServer
from tests.trainer.objects.bucket import SETUP, Bucket, new_bucket, resume, train_and_save
from tests.trainer.objects.test_runs import save_fsdp
from tests.trainer.training import all_ranks, error_of, require

DATA = r"PUT .*distcp"
# Each is more than a client without repetitions of its own can take.
PASSING = [
    [Fault("503", DATA, 3)],
    [Fault("429", DATA, 3), Fault("500", r"PUT .*/\.metadata", 2)],
    [Fault("reset", DATA, 3), Fault("reset", r"PUT .*/common\.pt", 1)],
    [Fault("truncate", DATA, 3), Fault("truncate", r"PUT .*metadata\.json", 1)],
    [Fault("503", "^GET ", 2), Fault("500", "^HEAD ", 2), Fault("503", "PUT .*latest_", 3)],
    [Fault("reset", "PUT .*/train_state|PUT .*/run_config|PUT .*progress", 3)],
]


def fail(server: ObjectServer, rank: int, *faults: Fault) -> None:
    """Let the server fail for all ranks."""
    barrier()
    if rank == 0:
        server.clear()
        server.fail(*faults)
    barrier()


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def save_through_faults(rank: int, bucket: Bucket) -> list[Any]:
    """Save once for each of PASSING, and once while the server is down, in the foreground and background."""
    prints = {}
    with bucket.in_use(), Run(SETUP, save=bucket.url) as run:
        run.state.cfg.logger.log_progress = True
        run.state.initialize_async_checkpoint_worker()
        for step, faults in enumerate([*PASSING, []], start=1):
            run.checkpoint.async_save = step % 2 == 0
            run.train(1)
            prints[step] = run.fingerprint()
            fail(bucket.server, rank, *faults)
            if not faults and rank == 0:
                bucket.server.go_down(1.0)
            run.save()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
            if step == len(PASSING):
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
    with bucket.in_use():
        fail(bucket.server, rank)
        if rank == 0:
            bucket.server.go_down(1.0)
        return [resume(bucket, prints, len(prints)), resume(bucket, prints, 4, ckpt_step=4)]


def test_what_passes_is_tried_again(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path)
    assert run_ranks(save_through_faults, 2, bucket) == [[[], []]] * 2
    steps = len(PASSING) + 1
    assert bucket.sealed() == list(range(1, steps + 1))
    assert bucket.tracked() == (steps, steps)
    assert os.listdir(bucket.spool) == []


@pytest.mark.long
def test_the_clients_own_repetitions_come_first(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path, retries=True)
    assert run_ranks(save_through_faults, 1, bucket) == [[[], []]]
    assert bucket.sealed() == list(range(1, len(PASSING) + 2))


def save_fsdp_through_faults(rank: int, bucket: Bucket) -> dict[str, list[str]]:
    faults = [Fault("503", DATA, 3), Fault("reset", r"PUT .*metadata", 2), Fault("500", "^GET .*distcp", 2)]
    fail(bucket.server, rank, *faults)
    return save_fsdp(rank, bucket)


@pytest.mark.skipif(not compat.HAVE_MEGATRON_FSDP, reason="needs Megatron FSDP")
def test_fsdp(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path)
    assert run_ranks(save_fsdp_through_faults, 2, bucket) == [{"now": [], "later": []}] * 2
    assert os.listdir(bucket.spool) == []


def meet_what_stays(rank: int, bucket: Bucket) -> dict[str, tuple[str, str]]:
    """Save, and then meet what no repetition mends; return the errors."""
    errors = {}
    lost = bucket.url.replace("/run", "-lost/run")
    with bucket.in_use():
        train_and_save(bucket, 1)
        with Run(SETUP, save=bucket.url) as run:
            run.train(2)
            for name, fault in (
                ("data", Fault("403", DATA)),
                ("seal", Fault("403", r"PUT .*/\.metadata")),
                ("tracker", Fault("403", "PUT .*latest_train")),
                ("list", Fault("403", "^GET ")),
            ):
                fail(bucket.server, rank, fault)
                errors[name] = error_of(run.save)
                barrier()
                tried = [each for each in bucket.server.requests() if "0_0.distcp" in each]
                if name == "data":
                    errors["uploads"] = "one", str(len([each for each in tried if each.startswith("PUT")]))
            fail(bucket.server, rank)
            run.checkpoint.save = lost
            errors["no bucket to save to"] = error_of(run.save)
        for name, place in (("no bucket to load from", lost), ("nothing there", f"{bucket.url}/none")):
            with Run(SETUP, load=place) as run:
                errors[name] = error_of(run.load)
        fail(bucket.server, rank, Fault("403", ""))
        with Run(SETUP, load=bucket.url) as run:
            errors["forbidden"] = error_of(run.load)
    return errors


def test_what_stays_fails_at_once(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path)
    url = bucket.of(2)
    for errors in run_ranks(meet_what_stays, 2, bucket):
        denied = "AccessDenied"
        require(errors["data"], "CheckpointWriteError", "cannot upload __", url, denied, "credentials")
        require(errors["uploads"], "one", "1")
        require(errors["seal"], "CheckpointWriteError", f"cannot write .metadata to {url}", denied)
        require(errors["tracker"], "CheckpointWriteError", f"{bucket.url}/latest_train_state.pt", denied)
        require(errors["list"], "CheckpointWriteError", f"cannot list {url}", denied, "Nothing was saved")
        require(errors["no bucket to save to"], "CheckpointWriteError", "-lost/run", "bucket does not exist")
        require(errors["no bucket to load from"], "StorageError", "-lost/run", "bucket does not exist")
        assert errors["nothing there"] == ("no error", "(0, 0)")
        require(errors["forbidden"], "StorageError", bucket.url, "Forbidden")
        for kind, text in errors.values():
            assert "file system" not in text, (kind, text)
    object_server.clear()
    assert bucket.tracked() == (1, 1)
    assert os.listdir(bucket.spool) == []


def wait_in_vain(rank: int, bucket: Bucket) -> dict[str, Any]:
    """Give up a background save that is being tried again; let another one, and a load, take too long."""
    found: dict[str, Any] = {}
    with bucket.in_use(), Run(SETUP, save=bucket.url, async_save=True) as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        run.save()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        fail(bucket.server, rank, Fault("503", DATA))
        run.train(1)
        run.save()
        (handle,) = run.state.async_calls_queue.handles
        while not any(each.startswith("PUT") for each in bucket.server.requests()):
            time.sleep(0.01)
        handle.cancel()
        found["cancelled"] = error_of(
            lambda: maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        )
        run.train(1)
        fail(bucket.server, rank, Fault("503", "PUT .*latest_train_state"))
        run.save()
        (handle,) = run.state.async_calls_queue.handles
        while not all_ranks(any("latest" in each for each in bucket.server.requests())):
            maybe_finalize_async_save(run.state, run.checkpoint)
            time.sleep(0.01)
        handle.cancel()
        found["unnamed"] = error_of(
            lambda: maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        )
        fail(bucket.server, rank, Fault("503", DATA))
        found["threads"] = [each.name for each in threading.enumerate() if "ckpt_fast" in each.name]
        run.checkpoint.async_save = False
        os.environ["CKPT_FAST_TIMEOUT"] = os.environ["CKPT_FAST_OUTAGE"] = "1"
        barrier()
        found["late"] = error_of(run.save)
        fail(bucket.server, rank, Fault("503", "HEAD "))
        run.checkpoint.load = bucket.url
        found["load"] = error_of(run.load)
    return found


def test_who_gives_up_waits_no_longer(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path)
    for found in run_ranks(wait_in_vain, 2, bucket):
        require(found["cancelled"], "AsyncSaveError", "cancelled")
        require(found["unnamed"], "AsyncSaveError", f"cannot write {bucket.url}/latest_train_state.pt: ")
        assert found["threads"] == []
        require(found["late"], "CheckpointWriteError", f"to {bucket.of(3)}: ", "SlowDown")
        require(found["load"], "StorageError", f"cannot look for {bucket.url}", "503")
    object_server.clear()
    assert bucket.tracked() == (1, 1)
    assert os.listdir(bucket.spool) == []


def log_of(rank: int, bucket: Bucket) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    patience.logger.addHandler(handler)
    bucket.server.fail(Fault("503", DATA, 3))
    with bucket.in_use(), Run(SETUP, save=bucket.url) as run:
        run.train(1)
        run.save()
    patience.logger.removeHandler(handler)
    return lines


def test_an_outage_is_told_twice(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path)
    ((first, last),) = run_ranks(log_of, 1, bucket)
    assert first.startswith(f"cannot upload __0_0.distcp to {bucket.of(1)}: ClientError: ")
    assert "(SlowDown)" in first
    assert last.startswith("the storage answers again")
    assert last.endswith(f"could upload __0_0.distcp to {bucket.of(1)}")


def be_killed(rank: int, bucket: Bucket, when: str) -> None:
    """Save 1 and 2; die when 3 is being saved in the background, at the first request that matches."""
    with bucket.in_use(), Run(SETUP, save=bucket.url, async_save=True) as run:
        run.state.initialize_async_checkpoint_worker()
        for _ in range(2):
            run.train(1)
            run.save()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        fail(bucket.server, rank, Fault("hang", when))
        run.train(1)
        run.save()
        while bucket.server.hanging() == 0:
            maybe_finalize_async_save(run.state, run.checkpoint)
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def go_on(rank: int, bucket: Bucket) -> list[Any]:
    """Resume from what is there, and save the next; return the step and what lies in the spool."""
    with bucket.in_use(), Run(SETUP, save=bucket.url, load=bucket.url) as run:
        step = run.load()[0]
        barrier()
        left = os.listdir(bucket.spool)
        run.train(1)
        run.save()
    return [step, left]


@pytest.mark.parametrize(
    "when",
    [
        r"PUT .*iter_0000003/__0_0\.distcp",
        pytest.param(r"PUT .*iter_0000003/\.metadata", marks=pytest.mark.long),
        pytest.param("PUT .*latest_train_state", marks=pytest.mark.long),
    ],
)
def test_killed_during_an_upload(object_server: ObjectServer, tmp_path: Path, when: str) -> None:
    bucket = new_bucket(object_server, tmp_path)
    with pytest.raises(RankError, match="ended without an answer"):
        run_ranks(be_killed, 2, bucket, when, fresh=True)
    left = os.listdir(bucket.spool)
    assert ("distcp" not in when) or left
    assert bucket.tracked() == (2, 2)
    bucket.server.clear()
    results = run_ranks(go_on, 2, bucket)
    # A request that had arrived may still be carried out.
    step = results[0][0]
    assert step in ((2, 3) if "latest" in when else (2,))
    assert results == [[step, []]] * 2
    assert bucket.tracked() == (step + 1, step + 1)
    assert bucket.sealed()[-1] == step + 1


def save_beside_a_late_request(rank: int, bucket: Bucket, pattern: str, step_again: int) -> dict[str, Any]:
    """Save while a request of the second save hangs until that save has failed; then let it arrive.

    Returns:
        What the trackers named after each save, and in the end; where a resumed run differs.
    """
    prints, named = {}, []
    with bucket.in_use(CKPT_FAST_TIMEOUT="2", CKPT_FAST_OUTAGE="2"), Run(SETUP, save=bucket.url) as run:
        run.checkpoint.async_save, run.checkpoint.on_save_failure = True, "continue"
        run.checkpoint.most_recent_k = 1
        run.state.initialize_async_checkpoint_worker()
        for step in (1, 2, step_again):
            run.train(1)
            run.state.train_state.step = step
            prints[step] = run.fingerprint()
            if len(named) == 1:
                fail(bucket.server, rank, Fault("hang", pattern, 1))
            run.save()
            while run.state.async_calls_queue.get_num_unfinalized_calls():
                maybe_finalize_async_save(run.state, run.checkpoint)
                time.sleep(0.02)
            named.append(bucket.tracked())
        barrier()
        bucket.server.clear()
        barrier()
        time.sleep(1)
        run.train(1)
        run.state.train_state.step = last = step_again + 1
        prints[last] = run.fingerprint()
        run.save()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
        named.append(bucket.tracked())
    with bucket.in_use():
        return {"named": named, "resumed": resume(bucket, prints, last)}


@pytest.mark.parametrize(
    ("pattern", "step_again"),
    [("PUT .*latest_train", 3), pytest.param("PUT .*iter_0000002/__0_0", 2, marks=pytest.mark.long)],
)
def test_a_late_request_of_a_failed_save_changes_nothing(
    object_server: ObjectServer, tmp_path: Path, pattern: str, step_again: int
) -> None:
    """It cannot be taken back, so saves in whose way it may come wait for it, or fail."""
    bucket = new_bucket(object_server, tmp_path)
    for found in run_ranks(save_beside_a_late_request, 2, bucket, pattern, step_again):
        assert found["named"][0] == found["named"][1] == found["named"][2] == (1, 1)
        assert found["named"][3] == (step_again + 1, step_again + 1)
        assert found["resumed"] == []


def train_through_an_outage(rank: int, bucket: Bucket, seconds: float) -> dict[str, Any]:
    """Train and save in the background while the server is away for longer than a save waits for it.

    Returns:
        Which saves failed, what the tracker named then, and where two resumed runs differ: one from what it
        named, one from the newest checkpoint.
    """
    prints: dict[int, dict[str, Any]] = {}
    failed: list[int] = []
    found: dict[str, Any] = {"failed": failed}
    going_on = {"async_save": True, "on_save_failure": "continue", "max_failed_saves": 1000}
    with bucket.in_use(CKPT_FAST_TIMEOUT="1", CKPT_FAST_OUTAGE="1"), Run(SETUP, save=bucket.url) as run:
        for name, value in going_on.items():
            setattr(run.checkpoint, name, value)
        run.state.initialize_async_checkpoint_worker()

        def save_once() -> bool:
            run.train(1)
            step = run.state.train_state.step
            run.save()
            prints[step] = run.fingerprint()  # with the operations that the save was told of
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
            return step in bucket.sealed() and bucket.tracked() == (step, step)

        assert save_once()
        barrier()
        end = time.monotonic() + seconds
        if rank == 0:
            bucket.server.go_down(seconds)
        barrier()
        while True:
            is_over = torch.tensor(int(time.monotonic() > end + 0.5))
            if dist.get_world_size() > 1:
                dist.broadcast(is_over, 0)
            if is_over:
                break
            run.train(1)
            run.save()
            prints[run.state.train_state.step] = run.fingerprint()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
            failed.append(run.state.train_state.step)
        barrier()
        found["stood"] = bucket.tracked()
        assert save_once()
        newest = run.state.train_state.step
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
    with bucket.in_use():
        standing = found["stood"][0]
        found["resumed from what stood"] = resume(bucket, prints, standing, ckpt_step=standing)
        found["resumed from the newest"] = resume(bucket, prints, newest)
    return found


@pytest.mark.parametrize("seconds", [4.0, pytest.param(120.0, marks=pytest.mark.long)])
def test_a_run_goes_on_through_an_outage(object_server: ObjectServer, tmp_path: Path, seconds: float) -> None:
    bucket = new_bucket(object_server, tmp_path)
    for found in run_ranks(train_through_an_outage, 2, bucket, seconds, timeout_s=600):
        assert found["failed"]
        assert found["stood"][0] <= found["failed"][-1]
        assert found["resumed from what stood"] == found["resumed from the newest"] == []
    assert os.listdir(bucket.spool) == []
