# SPDX-License-Identifier: Apache-2.0
"""torch DCP's own calls, after ``install``: who has written, and that both sides read the other's files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import ckpt_fast
from ckpt_fast.format.manifest import split_manifest
from tests.doors.dcp.ranks import FSDP2_ON_CPU, Trained, wrong
from tests.doors.dcp.states import blank, differences, odd_tensors, training_state
from tests.helpers import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def is_ours(directory: Path | str) -> bool:
    """Return whether ckpt_fast has written a checkpoint."""
    return split_manifest((Path(directory) / ".metadata").read_bytes())[1] is not None


# A call of torch's to save and one to load, as frameworks make them.
SAVES: dict[str, Any] = {
    "path": lambda state, path: dcp.save(state, checkpoint_id=path),
    "writer": lambda state, path: dcp.save(state, storage_writer=dcp.FileSystemWriter(path, True)),
    "writer and path": lambda state, path: dcp.save(
        state, checkpoint_id=path, storage_writer=dcp.FileSystemWriter("elsewhere")
    ),
    "as torchtune": lambda state, path: dcp.save(
        state,
        storage_writer=dcp.FileSystemWriter(
            path, thread_count=4, single_file_per_rank=False, sync_files=False
        ),
    ),
    "planner": lambda state, path: dcp.save(state, checkpoint_id=path, planner=dcp.DefaultSavePlanner()),
    "old": lambda state, path: dcp.save_state_dict(state, dcp.FileSystemWriter(path), no_dist=True),
}
LOADS: dict[str, Any] = {
    "path": lambda state, path: dcp.load(state, checkpoint_id=path),
    "reader": lambda state, path: dcp.load(state, storage_reader=dcp.FileSystemReader(path)),
    "old": lambda state, path: dcp.load_state_dict(state, dcp.FileSystemReader(path), no_dist=True),
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("save", SAVES)
def test_saves(save: str, tmp_path: Path) -> None:
    expected = training_state()
    with ckpt_fast.install(megatron=False):
        SAVES[save](expected, str(tmp_path / "ours"))
    SAVES[save](expected, str(tmp_path / "stock"))
    assert (is_ours(tmp_path / "ours"), is_ours(tmp_path / "stock")) == (True, False)
    for writer in ("ours", "stock"):
        with ckpt_fast.install(megatron=False):
            found = blank(expected)
            dcp.load(found, checkpoint_id=tmp_path / writer)
        assert differences(expected, found) == []
    found = blank(expected)
    dcp.load(found, checkpoint_id=tmp_path / "ours")
    assert differences(expected, found) == []


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("load", LOADS)
def test_loads(load: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = odd_tensors()
    dcp.save(expected, checkpoint_id=tmp_path)
    read: list[str] = []
    reading = ckpt_fast.FastStorageReader.read_data

    def counted(self: Any, plan: Any, planner: Any) -> Any:
        read.append(self.checkpoint_id)
        return reading(self, plan, planner)

    monkeypatch.setattr(ckpt_fast.FastStorageReader, "read_data", counted)
    with ckpt_fast.install(megatron=False):
        found = blank(expected)
        LOADS[load](found, str(tmp_path))
    assert differences(expected, found) == [] and read == [str(tmp_path)]


def test_torch_converts_with_ours(tmp_path: Path) -> None:
    expected = training_state()
    expected["optimizer"] = {"step": 3}  # torch makes strings of numbers in names
    torch.save(expected, tmp_path / "whole.pt")
    with ckpt_fast.install(megatron=False):
        torch_save_to_dcp(tmp_path / "whole.pt", tmp_path / "sharded")
        dcp_to_torch_save(tmp_path / "sharded", tmp_path / "again.pt")
        some = _load_state_dict_from_keys({"model"}, checkpoint_id=tmp_path / "sharded")
    assert is_ours(tmp_path / "sharded")
    assert differences(expected, torch.load(tmp_path / "again.pt", weights_only=False)) == []
    assert differences(expected["model"], some["model"]) == []


def test_parts_are_loaded_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frameworks load the model first and the optimizer later."""
    expected = training_state()
    with ckpt_fast.install(megatron=False):
        dcp.save(expected, checkpoint_id=tmp_path)
        found = {"model": blank(expected["model"])}
        dcp.load(found, checkpoint_id=tmp_path)
    assert differences(expected["model"], found["model"]) == []
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_metadata_as_frameworks_look_at_it(tmp_path: Path) -> None:
    with ckpt_fast.install(megatron=False):
        dcp.save(training_state(), checkpoint_id=tmp_path)
        ours = dcp.FileSystemReader(tmp_path).read_metadata()
    stock = dcp.FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == stock.state_dict_metadata
    assert ours.planner_data == stock.planner_data and ours.storage_data == stock.storage_data


def test_a_checkpoint_that_must_not_be_overwritten(tmp_path: Path) -> None:
    with ckpt_fast.install(megatron=False):
        dcp.save({"w": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path, overwrite=False))
        with pytest.raises(CheckpointException, match="overwrite is False"):
            dcp.save({"w": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path, overwrite=False))


# --- Two ranks, FSDP2 -------------------------------------------------------------------------------------


def save_both_ways(rank: int, root: str) -> list[bool]:
    run = Trained(seed=0)
    whole = run.whole()
    if rank == 0:
        torch.save(whole, f"{root}/whole.pt")
    dcp.save(run.state(), checkpoint_id=f"{root}/stock")
    with ckpt_fast.install(megatron=False):
        dcp.save(run.state(), checkpoint_id=f"{root}/ours")
        dcp.save(run.state(), storage_writer=dcp.FileSystemWriter(f"{root}/writer"))
    return [is_ours(f"{root}/{name}") for name in ("stock", "ours", "writer")]


def load_both_ways(rank: int, root: str) -> dict[str, list[str]]:
    found = {}
    for name in ("stock", "ours", "writer"):
        for installed in (True, False):
            run = Trained(seed=1)
            assert wrong(run.whole(), f"{root}/whole.pt"), "there is nothing to load"
            with ckpt_fast.install(megatron=False, torch_dcp=installed):
                run.load(None, checkpoint_id=f"{root}/{name}")
            found[f"{name}, installed: {installed}"] = wrong(run.whole(), f"{root}/whole.pt")
    return found


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 of this torch needs a GPU")
@pytest.mark.parametrize("readers", [1, 2])
def test_fsdp2(readers: int, tmp_path: Path) -> None:
    assert run_ranks(save_both_ways, 2, str(tmp_path)) == [[False, True, True]] * 2
    for found in run_ranks(load_both_ways, readers, str(tmp_path)):
        assert len(found) == 6 and set(map(tuple, found.values())) == {()}


def save_alone(rank: int, root: str) -> list[bool]:
    with ckpt_fast.install(megatron=False):
        state = {"rank": torch.full((5,), float(rank))}
        dcp.save(state, checkpoint_id=f"{root}/{rank}", no_dist=True)
        if rank == 1:
            dcp.load(state, checkpoint_id=f"{root}/1", no_dist=True)
        dist.barrier()
    found = {"rank": torch.zeros(5)}
    dcp.load(found, checkpoint_id=f"{root}/{rank}", no_dist=True)
    return [is_ours(f"{root}/{rank}"), bool((found["rank"] == rank).all())]


@pytest.mark.skipif("no_dist" not in inspect.signature(dcp.save).parameters, reason="torch knows no no_dist")
def test_ranks_save_alone(tmp_path: Path) -> None:
    assert run_ranks(save_alone, 2, str(tmp_path)) == [[True, True]] * 2


def fail_on_one(rank: int, root: str) -> str:
    state: dict[str, Any] = {"w": torch.ones(3)}
    if rank == 1:
        state["lambda"] = lambda: 0
    with ckpt_fast.install(megatron=False), pytest.raises(CheckpointException) as raised:
        dcp.save(state, checkpoint_id=root)
    return str(raised.value)


def test_a_failure_on_one_rank_reaches_all(tmp_path: Path) -> None:
    for message in run_ranks(fail_on_one, 2, str(tmp_path / "x")):
        assert "lambda" in message
    assert not (tmp_path / "x" / ".metadata").exists()
