# SPDX-License-Identifier: Apache-2.0
"""Verifying checkpoints of every format and place: Megatron-Core's, fsdp_dtensor, local, object storage."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing

from ckpt_fast import FastSaveStrategy, compat, verify
from ckpt_fast.cli import main
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.verification.report import State, Verdict
from tests.doors.local.test_manager import SETUP as LOCAL
from tests.doors.local.test_manager import local_state, manager
from tests.helpers import run_ranks
from tests.interop import saved
from tests.models import Run, megatron_on_cpu
from tests.object_server import ObjectServer
from tests.trainer.objects.bucket import Bucket, new_bucket, train_and_save
from tests.verification.runs import SETUP, flips, small_files

needs_resil = pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")


@pytest.fixture(scope="module")
def stock_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stock")
    run_ranks(saved.save_with_all, 1, SETUP, str(root), ("stock",))
    return root / "stock"


@pytest.fixture
def stock(stock_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(stock_run, tmp_path / "run")
    return tmp_path / "run" / "iter_0000002"


def test_a_run_of_megatron_core(stock: Path) -> None:
    for deep in (False, True):
        (report,) = verify(stock.parent, deep).checkpoints
        assert report.is_sound and report.is_selected and report.kind == "torch_dist" and not report.is_own
    for name in ("metadata.json", "run_config.yaml", "train_state.pt"):
        content = (stock / name).read_bytes()
        for damaged in (b"", None, content[: len(content) // 2]):
            (stock / name).unlink()
            if damaged is not None:
                (stock / name).write_bytes(damaged)
            report = verify(stock)
            assert report.verdict is Verdict.DAMAGED and name in report.damages[0]
            (stock / name).write_bytes(content)
    assert verify(stock).is_sound


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.long)])
def test_flips_in_small_files_of_megatron_core(stock: Path, count: int) -> None:
    """Of those with a checksum or a fixed text, all that matters; a configuration has neither."""
    for name in ("metadata.json", "common.pt", "train_state.pt"):
        path = stock / name
        if not path.exists():  # later versions keep the common state with the data
            continue
        content = path.read_bytes()
        expected = json.loads(content) if name.endswith("json") else torch.load(path, weights_only=False)
        for at in flips(path, count):
            if verify(stock).is_sound:
                found = (
                    json.loads(path.read_bytes())
                    if name.endswith("json")
                    else torch.load(path, weights_only=False)
                )
                assert str(found) == str(expected), (name, at)


def write_integrity(directory: Path) -> Path:
    """Do what Megatron-Core from 0.19 on does with ``verify_integrity=True``."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != "integrity.json")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    path = directory / "integrity.json"
    path.write_text(json.dumps({"algorithm": "sha256", "files": digests}, indent=2))
    return path


def test_integrity_names_every_flip(stock: Path) -> None:
    integrity = write_integrity(stock)
    assert verify(stock, deep=True).is_sound and verify(stock).is_sound
    for path in small_files(stock):
        for at in flips(path, 12):
            report = verify(stock, deep=True)
            assert report.verdict is Verdict.DAMAGED, (path.name, at)
    data = stock / "__0_0.distcp"
    for _ in flips(data, 20):
        report = verify(stock, deep=True)
        assert [each.state for each in report.files if each.path == data.name] == [State.FLIPPED]
    data.rename(stock / "gone")
    assert verify(stock).verdict is Verdict.DAMAGED
    (stock / "gone").rename(data)
    integrity.unlink()
    assert verify(stock, deep=True).is_sound


def save_with_integrity(rank: int, root: str) -> None:
    with Run(SETUP) as run, megatron_on_cpu():
        run.train(1)
        for name, strategy in (("ours", FastSaveStrategy()), ("stock", None)):
            os.mkdir(f"{root}/{name}")
            state = run.sharded_state_dict()
            options: Any = {"verify_integrity": True}
            dist_checkpointing.save(state, f"{root}/{name}", strategy, **options)
            state = run.sharded_state_dict(is_loading=True)
            dist_checkpointing.load(state, f"{root}/{name}", **options)


@pytest.mark.skipif(
    "verify_integrity" not in inspect.signature(dist_checkpointing.save).parameters,
    reason="this Megatron-Core writes no integrity.json",
)
def test_integrity_of_megatron_core(tmp_path: Path) -> None:
    """Right for what our strategy writes, too; Megatron-Core's own check passes."""
    run_ranks(save_with_integrity, 1, str(tmp_path))
    for name, is_own in (("ours", True), ("stock", False)):
        report = verify(tmp_path / name, deep=True)
        assert report.is_sound and report.is_own is is_own
        assert {each.state for each in report.files} == {State.SOUND}
        assert "integrity.json" in {each.path for each in report.files}


def save_local(rank: int, root: str) -> None:
    with Run(LOCAL, save=root) as run:
        run.train(1)
        manager(f"{root}/ours", replicated=False).save(local_state(run), 1)
        managers, _ = compat.import_local_checkpointing()
        del managers
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import (
            LocalCheckpointManager,
        )

        LocalCheckpointManager(f"{root}/theirs").save(local_state(run), 1)


@needs_resil
def test_local_checkpoints(tmp_path: Path) -> None:
    run_ranks(save_local, 2, str(tmp_path))
    for name, is_own in (("ours", True), ("theirs", False)):
        report = verify(tmp_path / name, deep=True)
        assert report.is_sound and report.is_own is is_own
        assert [each.kind for each in report.checkpoints] == ["local"] * 2
        for each in report.checkpoints:
            path = Path(each.path)
            assert verify(path, deep=True).is_sound
            (target,) = [path] if path.is_file() else path.glob("*.distcp")
            content = target.read_bytes()
            target.write_bytes(content[:-100])
            assert verify(path).verdict is Verdict.DAMAGED
            middle = bytearray(content)
            middle[len(middle) // 2] ^= 1
            target.write_bytes(middle)
            assert verify(path, deep=True).verdict is Verdict.DAMAGED
            target.write_bytes(content)
    ours = Path(verify(tmp_path / "ours").checkpoints[0].path)
    renamed = ours.with_name(ours.name.replace("0000001", "0000002"))
    ours.rename(renamed)
    report = verify(renamed)
    assert report.verdict is Verdict.DAMAGED and "at iteration 1" in report.damages[0]


def test_fsdp_dtensor(tmp_path: Path) -> None:
    """As Megatron's: torch DCP's files, with the counters and the configuration of a run."""
    path = tmp_path / "iter_0000001"
    dcp.save({"model": {"w": torch.ones(8, 3)}}, storage_writer=dcp.FileSystemWriter(path))
    assert verify(path).kind == "torch_dcp"
    torch.save({"step": torch.tensor(1)}, path / "train_state.pt")
    report = verify(path)
    assert report.kind == "fsdp_dtensor" and not report.is_complete
    (path / "run_config.yaml").write_text("model: {}\ncheckpoint: {}\n")
    assert verify(path, deep=True).is_sound
    (path / ".metadata").unlink()
    assert verify(path).verdict is Verdict.DAMAGED


def save_objects(rank: int, bucket: Bucket) -> None:
    with bucket.in_use():
        train_and_save(bucket, 2)


def test_object_storage(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = new_bucket(object_server, tmp_path)
    run_ranks(save_objects, 1, bucket)

    def report(deep: bool = True) -> Any:
        with bucket.in_use():
            return verify(bucket.url, deep)

    found = report()
    assert found.is_sound and [each.is_selected for each in found.checkpoints] == [False, True]
    assert found.checkpoints[1].path == bucket.of(2) and list(Path(bucket.spool).iterdir()) == []
    with bucket.in_use():
        msc = object_storage(bucket.url)
        client, key = msc.resolve_storage_client(f"{bucket.of(2)}/__0_0.distcp")
        content = bytearray(client.read(key))
        content[len(content) // 2] ^= 1
        client.write(key, bytes(content))
    assert report().checkpoints[1].verdict is Verdict.DAMAGED
    assert report(deep=False).is_sound
    with bucket.in_use():
        compat.MultiStorageClientFeature._enabled = False
        assert main(["verify", bucket.url]) == 0, "the command switches it on"
        assert main(["verify", "--deep", bucket.url]) == 1
        assert main(["verify", f"msc://{bucket.name}-lost/run"]) == 2
        assert main(["verify", "s3://bucket/run"]) == 2
    with bucket.in_use():
        client.delete(key)
    assert report(deep=False).checkpoints[1].verdict is Verdict.DAMAGED
    with bucket.in_use(), pytest.raises(FileNotFoundError):
        verify(f"msc://{bucket.name}/elsewhere")
