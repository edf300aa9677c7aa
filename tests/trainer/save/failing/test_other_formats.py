# SPDX-License-Identifier: Apache-2.0
"""Training goes on after failed saves of ``fsdp_dtensor``, of local checkpoints, and to object storage."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.tensor import DTensor

from ckpt_fast import compat
from ckpt_fast.callbacks import CallbackManager
from ckpt_fast.checkpointing import init_checkpointing_context, maybe_finalize_async_save
from ckpt_fast.compat import MultiStorageClientFeature
from ckpt_fast.doors.dcp.direct import save as dcp_save
from tests.helpers import run_ranks, uninstall_rng_tracker
from tests.models import Run, Setup, identical
from tests.trainer import training
from tests.trainer.contents.test_fsdp_runs import Training
from tests.trainer.save.failing import faults
from tests.trainer.training import iterations, tracked

GOING_ON: dict[str, Any] = {"async_save": True, "async_strategy": "mcore", "on_save_failure": "continue"}
SETUP = Setup(bf16=True, distributed=True)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    monkeypatch.setenv("CKPT_FAST_RETRIES", "0")


def poll(run: Any) -> None:
    while run.state.async_calls_queue.get_num_unfinalized_calls():
        maybe_finalize_async_save(run.state, run.state.cfg.checkpoint)


@contextlib.contextmanager
def plans_counted(counts: list[int]) -> Iterator[None]:
    """Append the number of times that this rank's part is decided anew."""
    original, planned = dcp_save._Collecting._keep, []
    dcp_save._Collecting._keep = lambda self, division: planned.append(original(self, division))
    try:
        yield
    finally:
        dcp_save._Collecting._keep = original
        counts.append(len(planned))


def plain(parts: Any) -> Any:
    """Return copies that keep nothing of a model alive."""

    def copied(value: Any) -> Any:
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.detach().clone() if isinstance(whole, torch.Tensor) else whole

    return torch.utils._pytree.tree_map(copied, parts)


def save_fsdp(rank: int, root: str, fault: str) -> tuple[list[int], bool]:
    """Save iterations 1 to 5; let that of 3 fail.

    Return how often each planned, and whether 4 equals a save by a new program.
    """
    counts: list[int] = []
    expected = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "HAVE_NVRX", False)
        run = Training(save=root, **GOING_ON)
        run.state.initialize_async_checkpoint_worker()
        for step in range(1, 6):
            breaking = faults.FAULTS[fault](rank, root, step) if step == 3 else contextlib.nullcontext()
            with plans_counted(counts), breaking:
                expected[step] = plain(run.save())
                poll(run)
            if step == 3:
                assert tracked(root) == (2, 2)
            if step == 4:
                # The same state, saved by a program that nothing was saved with.
                dcp_save.forget()
                run.state.cfg.checkpoint.save = f"{root}/again"
                run.save()
                poll(run)
                run.state.cfg.checkpoint.save = root
            run.train()
        maybe_finalize_async_save(run.state, run.state.cfg.checkpoint, blocking=True, terminate=True)
        name = f"__{rank}_0.distcp"
        same = filecmp.cmp(f"{root}/iter_0000004/{name}", f"{root}/again/iter_0000004/{name}", shallow=False)
    if rank == 0:
        torch.save(expected, f"{root}/expected.pt")
    uninstall_rng_tracker()
    return counts, same


def load_fsdp(rank: int, root: str, step: int) -> Any:
    run = Training(seed=5, load=root, ckpt_step=step)
    result = run.load()
    after = plain(run.parts())
    uninstall_rng_tracker()
    return result[0], identical(torch.load(f"{root}/expected.pt", weights_only=False)[step], after)


@pytest.mark.skipif(not compat.HAVE_MEGATRON_FSDP, reason="needs Megatron FSDP")
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("fault", ["disk_full", "unsealable", "no_directory"])
def test_fsdp(tmp_path: Path, fault: str, ranks: int) -> None:
    root = str(tmp_path / "run")
    for counts, same in run_ranks(save_fsdp, ranks, root, fault):
        assert (counts[1:], same) == ([0, 0, 1, 0], True)
    assert iterations(root) == [1, 2, 4, 5]
    for step in (2, 4):
        assert run_ranks(load_fsdp, ranks, root, step) == [(step, True)] * ranks


class objects_in_the_way:
    """A directory lies where an object of the last rank should be put."""

    def __init__(self, rank: int, path: Path) -> None:
        self._rank, self._path = rank, path

    def __enter__(self) -> None:
        if self._rank == 0:
            (self._path / "in_the_way").mkdir(parents=True)
        dist.barrier()

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        if self._rank == 0:
            shutil.rmtree(self._path)
        dist.barrier()


def save_to_objects(rank: int, url: str, base: Path, spool: str) -> list[tuple[int, list[str]]]:
    """Return after each save how many failed in a row, and what is left in the spool."""
    found = []
    last = dist.get_world_size() - 1
    MultiStorageClientFeature.enable()
    with Run(SETUP, save=url, **GOING_ON) as run:
        run.state.initialize_async_checkpoint_worker()
        for step in (1, 2, 3):
            run.train(1)
            obstacle = objects_in_the_way(rank, base / f"iter_{step:07d}/__{last}_0.distcp")
            with obstacle if step == 2 else contextlib.nullcontext():
                run.save()
                poll(run)
            dist.barrier()
            found.append((run.state.async_calls_queue.failures.count, os.listdir(spool)))
            dist.barrier()
            torch.save(run.fingerprint(), training._expected(str(base), step, rank))
    return found


def load_objects(rank: int, url: str, base: str, step: int) -> set[str]:
    MultiStorageClientFeature.enable()
    return training.load(rank, SETUP, base, step, {"load": url, "ckpt_step": step}, {}).restored


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """Return a URL, and the directory with its objects; there is a directory "spool" beside that."""
    pytest.importorskip("multistorageclient")
    (tmp_path / "spool").mkdir()
    provider = {"type": "file", "options": {"base_path": str(tmp_path)}}
    profiles = {"profiles": {"failing": {"storage_provider": provider}}}
    (tmp_path / "msc.yaml").write_text(yaml.safe_dump(profiles))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    monkeypatch.setenv("CKPT_FAST_SPOOL", str(tmp_path / "spool"))
    return "msc://failing/run", tmp_path / "run"


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_object_storage(objects: tuple[str, Path], ranks: int) -> None:
    url, base = objects
    spool = base.parent / "spool"
    results = run_ranks(save_to_objects, ranks, url, base, str(spool), fresh=True)
    assert results == [[(0, []), (1, []), (0, [])]] * ranks
    assert tracked(str(base)) == (3, 3)
    for step in (1, 3):
        assert run_ranks(load_objects, ranks, url, str(base), step, fresh=True) == [training.ALL] * ranks


def upload_fsdp(rank: int, url: str, base: Path, fault: str) -> tuple[list[int], set[str]]:
    """Save iterations 1 to 3 by an upload; let that of 2 fail. Return counts, and the errors."""
    MultiStorageClientFeature.enable()
    counts, errors = [], set()
    manager = CallbackManager()
    manager.register("on_checkpoint_save_failed", lambda context: errors.add(str(context.save_error)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "HAVE_NVRX", False)
        run = Training(save=url, **GOING_ON)
        run.state.initialize_async_checkpoint_worker()
        for step in (1, 2, 3):
            obstacle: Any = contextlib.nullcontext()
            if step == 2 and fault == "data":
                obstacle = objects_in_the_way(rank, base / f"iter_{step:07d}/__1_0.distcp")
            elif step == 2:
                obstacle = faults.unpublished(rank, url, step)
            with obstacle:
                run.save(callback_manager=manager)
                poll(run)
            counts.append(run.state.async_calls_queue.failures.count)
            run.train()
    uninstall_rng_tracker()
    return counts, errors


@pytest.mark.skipif(not compat.HAVE_MEGATRON_FSDP, reason="needs Megatron FSDP")
@pytest.mark.parametrize(("fault", "text"), [("data", "__1_0.distcp"), ("trackers", "read-only")])
def test_fsdp_to_object_storage(objects: tuple[str, Path], fault: str, text: str) -> None:
    url, base = objects
    for counts, (error,) in run_ranks(upload_fsdp, 2, url, base, fault, fresh=True):
        assert counts == [0, 1, 0]
        assert text in error
    assert tracked(str(base)) == (3, 3)


def save_locally(rank: int, root: str) -> tuple[list[int], list[int]]:
    """Save local checkpoints; return how many failed in a row after each, and the iterations there are."""
    counts = []
    config = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": root, "save": root}
    with Run(SETUP, **config, **GOING_ON) as run:
        run.state.initialize_async_checkpoint_worker()
        context = init_checkpointing_context(run.checkpoint)
        for step in (1, 2, 3):
            run.train(1)
            with faults.disk_full(rank, root, step) if step == 2 else contextlib.nullcontext():
                run.save(checkpointing_context=context, non_persistent_ckpt=True)
                poll(run)
            counts.append(run.state.async_calls_queue.failures.count)
            if step == 2:
                found = context["local_checkpoint_manager"].find_latest()
        return counts, [found, context["local_checkpoint_manager"].find_latest()]


def test_local_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("nvidia_resiliency_ext")
    assert run_ranks(save_locally, 2, str(tmp_path)) == [([0, 1, 0], [1, 3])] * 2
