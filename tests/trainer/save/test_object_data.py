# SPDX-License-Identifier: Apache-2.0
"""``torch_dist`` checkpoints on ``msc://`` paths, with the real multi-storage-client and a local profile."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing

from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.compat import MultiStorageClientFeature
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.pipeline.load.index import CheckpointIndex
from tests.helpers import run_ranks
from tests.manifests import find_damage
from tests.models import FLOPS, Run, Setup, differences, identical, megatron_on_cpu, other
from tests.trainer.save.test_policies import DAMAGES
from tests.trainer.training import error_of, is_sealed, iterations, require, tracked

SETUP = Setup(distributed=True, reshardable=True)

profiles = (f"data{number}" for number in itertools.count())


class Bucket:
    """A profile whose objects are files under a local directory, and a spool."""

    def __init__(self, directory: Path) -> None:
        self.local = str(directory / "bucket" / "run")
        self.spool = str(directory / "spool")
        self.profile = next(profiles)  # these are cached, so each test has its own
        self.url = f"msc://{self.profile}/run"
        (directory / "spool").mkdir()
        (directory / "bucket").mkdir()
        provider = {"type": "file", "options": {"base_path": str(directory / "bucket")}}
        self.config = str(directory / "msc.yaml")
        Path(self.config).write_text(
            yaml.safe_dump({"profiles": {self.profile: {"storage_provider": provider}}})
        )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Enable the feature on this rank."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MultiStorageClientFeature, "_enabled", True)
            patch.setenv("CKPT_FAST_SPOOL", self.spool)
            patch.setenv("MSC_CONFIG", self.config)
            yield

    def of(self, step: int) -> tuple[str, str]:
        """Return an iteration's checkpoint, as URL and as directory."""
        name = f"iter_{step:07d}"
        return f"{self.url}/{name}", f"{self.local}/{name}"


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    pytest.importorskip("multistorageclient")
    return Bucket(tmp_path)


def loaded(setup: Setup, **config: Any) -> tuple[tuple[int, float], dict[str, Any]]:
    """Return result and fingerprint of a run that was in another state before it loaded."""
    with Run(other(setup), **config) as run:
        run.train(2)
        return run.load(), run.fingerprint()


def save_and_resume(rank: int, bucket: Bucket) -> dict[str, Any]:
    """Save 1 synchronously, 2 and 3 in the background; resume from the newest, by step and by directory."""
    found: dict[str, Any] = {}
    prints = {}
    with bucket.in_use():
        with Run(SETUP, save=bucket.url) as run:
            run.train(1)
            run.save()
            prints[1] = run.fingerprint()
        with Run(SETUP, save=bucket.url, load=bucket.url, async_save=True, most_recent_k=2) as run:
            run.state.initialize_async_checkpoint_worker()
            assert run.load() == (1, FLOPS)
            for step in (2, 3):
                run.train(1)
                run.save()
                prints[step] = run.fingerprint()
                assert tracked(bucket.local) == (step - 1, step - 1)
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
        for name, step, config in (
            ("newest", 3, {"load": bucket.url}),
            ("by step", 2, {"load": bucket.url, "ckpt_step": 2}),
            ("by directory", 2, {"load": bucket.of(2)[0], "dist_ckpt_strictness": "raise_all"}),
        ):
            result, fingerprint = loaded(SETUP, **config)
            found[name] = (result[0] - step, differences(prints[step], fingerprint))
        # Another layout, compared with the same checkpoint as files.
        (_, one), (_, two) = (loaded(other(SETUP, tp=2), load=place) for place in (bucket.url, bucket.local))
        found["resharded"] = (0, differences(one, two))
    return found


def test_what_was_saved_comes_back(bucket: Bucket) -> None:
    for found in run_ranks(save_and_resume, 2, bucket):
        assert all(result == (0, []) for result in found.values()), found
    assert os.listdir(bucket.spool) == []
    assert iterations(bucket.local) == [2, 3]  # most_recent_k
    _, saved = bucket.of(3)
    assert {"common.pt", ".metadata", "metadata.json"} < set(os.listdir(saved))
    assert find_damage(saved) == []


def fall_back(rank: int, bucket: Bucket) -> list[tuple[int, float]]:
    with bucket.in_use():
        results = [loaded(Setup(), load=f"{bucket.url}/{name}")[0] for name in DAMAGES]
        error = error_of(lambda: loaded(Setup(), load=f"{bucket.url}/bit", on_corrupt="raise"))
    require(error, "CheckpointCorruptError", f"{bucket.url}/bit/iter_0000002/__0_0.distcp")
    return results


def save_steps(rank: int, bucket: Bucket) -> None:
    with bucket.in_use(), Run(Setup(), save=bucket.url) as run:
        for _ in range(2):
            run.train(1)
            run.save()


def test_damaged_objects_are_skipped(bucket: Bucket) -> None:
    run_ranks(save_steps, 2, bucket)
    saved = shutil.copytree(bucket.local, f"{bucket.local}.saved")
    for name, damage in DAMAGES.items():
        damage(os.path.join(shutil.copytree(saved, f"{bucket.local}/{name}"), "iter_0000002"))
    assert run_ranks(fall_back, 2, bucket) == [[(1, FLOPS)] * len(DAMAGES)] * 2
    assert os.listdir(bucket.spool) == []


def other_doors(rank: int, bucket: Bucket) -> list[str]:
    """Write and read with ours and stock, by URL and by directory; return which differ."""
    wrong = []
    with bucket.in_use(), Run(Setup()) as run:
        run.train(1)
        ours, strategy, queued, stock = (bucket.of(step) for step in (1, 2, 3, 4))
        job = torch_dist.start_save(run.sharded_state_dict(), ours[0], torch_dist.FastSaveStrategy())
        job.write()
        job.commit()
        if rank == 0:
            os.makedirs(stock[1])
            os.makedirs(strategy[1])
            os.makedirs(queued[1])
        torch.distributed.barrier()
        dist_checkpointing.save(run.sharded_state_dict(), strategy[0], torch_dist.FastSaveStrategy())
        request = dist_checkpointing.save(
            run.sharded_state_dict(), queued[0], torch_dist.FastSaveStrategy(), async_sharded_save=True
        )
        request.execute_sync()
        with megatron_on_cpu():
            writer = torch_dist.compat.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
            dist_checkpointing.save(run.sharded_state_dict(), stock[1], writer)
            expected = dist_checkpointing.load(run.sharded_state_dict(True), stock[1])
        places = {"ours": ours, "strategy": strategy, "queued": queued, "stock": stock}
        for name, (url, directory) in places.items():
            loads = {
                "ours by URL": lambda url=url: torch_dist.load(run.sharded_state_dict(True), url),
                "strategy by URL": lambda url=url: dist_checkpointing.load(
                    run.sharded_state_dict(True), url, torch_dist.FastLoadStrategy()
                ),
                "stock by directory": lambda directory=directory: dist_checkpointing.load(
                    run.sharded_state_dict(True), directory
                ),
            }
            for door, load in loads.items():
                with megatron_on_cpu():
                    if not identical(expected, load()):
                        wrong.append(f"{name} {door}")
            reader = torch_dist.FastLoadStrategy()
            if set(reader.load_tensors_metadata(url)) != set(reader.load_tensors_metadata(directory)):
                wrong.append(f"{name} tensors metadata")
            if set(reader.load_sharded_metadata(url)) != set(reader.load_sharded_metadata(directory)):
                wrong.append(f"{name} metadata")
        torch.distributed.barrier()
        if rank == 0:
            reader.remove_sharded_tensors(ours[0], "optimizer")
            for url_or_directory in ours:
                left = reader.load_tensors_metadata(url_or_directory)
                wrong += [name for name in left if name.startswith("optimizer")] + ["none"] * (not left)
    return wrong


def test_the_objects_are_the_files_of_a_local_save(bucket: Bucket) -> None:
    assert run_ranks(other_doors, 2, bucket) == [[], []]
    assert os.listdir(bucket.spool) == []


def fail_to_upload(rank: int, bucket: Bucket) -> dict[str, tuple[str, str]]:
    """Obstruct rank 1's data (in both modes), the coordinator's seal, and the spool; return the errors."""
    errors = {}
    with bucket.in_use(), Run(SETUP, save=bucket.url) as run:
        run.train(1)
        run.save()
        run.train(1)
        _obstruct(rank, bucket, "__1_0.distcp")
        errors["data"] = error_of(run.save)
        run.checkpoint.async_save = True
        run.state.initialize_async_checkpoint_worker()
        run.save()
        errors["background"] = error_of(
            lambda: maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        )
        run.checkpoint.async_save = False
        _obstruct(rank, bucket, ".metadata")
        errors["seal"] = error_of(run.save)
        os.environ["CKPT_FAST_SPOOL"] = bucket.config
        errors["spool"] = error_of(run.save)
    return errors


def _obstruct(rank: int, bucket: Bucket, name: str) -> None:
    """Put a directory in place of an object of iteration 2."""
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(bucket.of(2)[1], ignore_errors=True)
        os.makedirs(os.path.join(bucket.of(2)[1], name, "in the way"))
    torch.distributed.barrier()


def test_a_failed_upload_loses_nothing(bucket: Bucket) -> None:
    url, _ = bucket.of(2)
    for errors in run_ranks(fail_to_upload, 2, bucket):
        upload = f"rank 1: cannot upload __1_0.distcp to {url}: "
        require(errors["data"], "CheckpointWriteError", upload, "See that the storage can be reached")
        require(errors["background"], "AsyncSaveError", upload)
        require(errors["seal"], "CheckpointWriteError", f"rank 0: cannot write .metadata to {url}: ")
        require(
            errors["spool"], "CheckpointWriteError", f"cannot create a spool for {url}", "CKPT_FAST_SPOOL"
        )
    assert tracked(bucket.local) == (1, 1)
    assert (is_sealed(bucket.local, 1), is_sealed(bucket.local, 2)) == (True, False)
    assert os.listdir(bucket.spool) == []


def cancel_and_overwrite(rank: int, bucket: Bucket) -> list[str]:
    with bucket.in_use(), Run(SETUP, save=bucket.url, async_save=True) as run:
        run.train(1)
        run.state.initialize_async_checkpoint_worker()
        run.save()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        first = is_sealed(bucket.local, 1)
        torch.distributed.barrier()
        run.save()
        (handle,) = run.state.async_calls_queue.handles
        handle.cancel()
        error = error_of(lambda: maybe_finalize_async_save(run.state, run.checkpoint, blocking=True))
    return [str(first), *error, str(is_sealed(bucket.local, 1))]


def test_a_save_over_another_takes_its_seal_first(bucket: Bucket) -> None:
    for first, kind, text, sealed in run_ranks(cancel_and_overwrite, 2, bucket):
        assert (first, kind, sealed) == ("True", "AsyncSaveError", "False")
        assert "was cancelled" in text
    assert os.listdir(bucket.spool) == []


def save_and_load(rank: int, url: str) -> list[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch, Run(Setup(), save=url) as run:
        patch.setattr(MultiStorageClientFeature, "_enabled", False)
        run.train(1)
        return [error_of(run.save), error_of(lambda: CheckpointIndex(url))]


def test_other_urls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their data would end up in a local directory called "s3:"."""
    monkeypatch.chdir(tmp_path)
    ((saving, loading),) = run_ranks(save_and_load, 1, "s3://bucket/run")
    require(saving, "CheckpointWriteError", "cannot save to s3://bucket/run", "multi-storage-client")
    require(loading, "CheckpointMismatchError", "cannot load from s3://bucket/run", "multi-storage-client")
    assert list(tmp_path.iterdir()) == []
