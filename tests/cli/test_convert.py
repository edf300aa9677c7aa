# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast convert``: what stock readers find in what it writes, and what an interruption leaves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckpt_fast
from ckpt_fast.errors import CheckpointMismatchError, CheckpointWriteError
from ckpt_fast.tools.convert import archives, convert, safetensors
from ckpt_fast.tools.diff import compare
from tests.cli.running import in_pipe, on_terminal, state
from tests.helpers import run_ranks
from tests.models import identical


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the checkpoint were large: many parts, pieces and files."""
    monkeypatch.setattr(archives, "PART_NBYTES", 5000)
    monkeypatch.setattr(safetensors, "_WINDOW_NBYTES", 5000)
    monkeypatch.setattr(safetensors, "FILE_NBYTES", 10_000)


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_to_dcp(writer: str, dcp_checkpoints: dict[str, Path], tmp_path: Path, small_parts: None) -> None:
    ran = in_pipe("convert", dcp_checkpoints[writer], tmp_path / "new", "--to", "dcp", "--json")
    assert ran.status == 0 and ran.value["tensors"] == 5 and ran.value["left_out"] == []
    assert compare(dcp_checkpoints[writer], tmp_path / "new").is_equal
    assert ckpt_fast.verify(tmp_path / "new").is_sound
    dcp_to_torch_save(tmp_path / "new", tmp_path / "file.pt")
    assert identical(torch.load(tmp_path / "file.pt"), state())
    assert not list((tmp_path / "new").glob("part_*"))


def stock_megatron(rank: int, directory: str) -> dict[str, Any]:
    tensors = dist_checkpointing.load_plain_tensors(directory)
    return {"tensors": tensors, "common": dist_checkpointing.load_common_state_dict(directory)}


def test_dcp_to_torch_dist(dcp_checkpoints: dict[str, Path], tmp_path: Path, small_parts: None) -> None:
    new = tmp_path / "new"
    assert in_pipe("convert", dcp_checkpoints["stock"], new, "--to", "torch_dist").status == 0
    assert ckpt_fast.verify(new).is_sound
    (found,) = run_ranks(stock_megatron, 1, str(new))
    assert identical(found["tensors"]["model.weight"], state()["model"]["weight"])
    common = found["common"]
    assert common["step"] == 7 and common["optimizer"]["groups"] == [{"lr": 0.1}, {"lr": 0.2}]


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_torch_dist_to_dcp_and_back(
    writer: str, runs: dict[str, Path], tmp_path: Path, small_parts: None
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert in_pipe("convert", runs[writer], there, "--to", "dcp").status == 0
    found = {each.kind for each in compare(runs[writer], there).differences}
    assert found == {"only in A", "only in B"}, "the common state has become objects"
    assert "torch_dist" in on_terminal("convert", runs[writer], back, "--to", "torch_dist").text
    assert compare(runs[writer], back).is_equal
    (stock,) = run_ranks(stock_megatron, 1, str(back))
    (before,) = run_ranks(stock_megatron, 1, str(runs[writer] / "iter_0000003"))
    assert identical(stock, before)


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_to_safetensors(
    writer: str, dcp_checkpoints: dict[str, Path], runs: dict[str, Path], tmp_path: Path, small_parts: None
) -> None:
    files = pytest.importorskip("safetensors.torch")
    ran = in_pipe("convert", dcp_checkpoints[writer], tmp_path / "new", "--to", "safetensors", "--json")
    assert ran.status == 0 and ran.value["tensors"] == 4
    assert set(ran.value["left_out"]) == {
        "optimizer.state.weight.exp_avg",
        "optimizer.groups.0.lr",
        "optimizer.groups.1.lr",
        "step",
    }
    found = {}
    for path in (tmp_path / "new").glob("*.safetensors"):
        found.update(files.load_file(path))
    assert identical(found, {f"model.{name}": value for name, value in state()["model"].items()})
    assert (tmp_path / "new" / safetensors.INDEX_FILE).exists() == (
        len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    )
    run = in_pipe("convert", runs[writer], tmp_path / "run", "--to", "safetensors", "--optimizer", "--json")
    assert run.status == 0 and run.value["tensors"] > ran.value["tensors"]


def test_without_the_optimizer(runs: dict[str, Path], tmp_path: Path) -> None:
    new = tmp_path / "new"
    value = in_pipe("convert", runs["ours"], new, "--to", "torch_dist", "--no-optimizer", "--json").value
    assert value["left_out"] and all("optimizer" in name for name in value["left_out"])
    (found,) = run_ranks(stock_megatron, 1, str(new))
    assert not [name for name in (*found["tensors"], *found["common"]) if "optim" in name]
    assert "checkpoint_version" in found["common"] or "iteration" in found["common"]


class InterruptedHereError(Exception):
    pass


def interrupted_after(calls: int) -> Any:
    """A progress function that ends the conversion at its n-th call."""
    left = [calls]

    def progress(done: int, total: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise InterruptedHereError

    return progress


@pytest.mark.parametrize("to", ["dcp", "torch_dist", "safetensors"])
@pytest.mark.parametrize("calls", [1, 3])
def test_an_interrupted_conversion_goes_on(
    to: Any, calls: int, dcp_checkpoints: dict[str, Path], tmp_path: Path, small_parts: None
) -> None:
    source = dcp_checkpoints["ours"]
    new, whole = tmp_path / "new", tmp_path / "whole"
    convert(source, whole, to, weights_only=False)
    with pytest.raises(InterruptedHereError):
        convert(source, new, to, weights_only=False, progress=interrupted_after(calls))
    assert in_pipe("inspect", new).status == 2, "it is no checkpoint yet"
    kept = {path.name: path.stat().st_ino for path in new.iterdir() if not path.name.startswith(".")}
    again = convert(source, new, to, weights_only=False)
    assert again.resumed == bool(kept)
    assert {path.name for path in new.iterdir()} == {path.name for path in whole.iterdir()}
    for name, inode in kept.items():
        if not name.startswith("part_"):
            assert (new / name).stat().st_ino == inode, f"{name} was written again"
    if to != "safetensors":
        assert ckpt_fast.verify(new).is_sound and compare(new, whole).is_equal
    else:
        assert all((new / path.name).read_bytes() == path.read_bytes() for path in whole.iterdir())


def test_a_damaged_part_is_written_again(
    dcp_checkpoints: dict[str, Path], tmp_path: Path, small_parts: None
) -> None:
    new = tmp_path / "new"
    with pytest.raises(InterruptedHereError):
        convert(dcp_checkpoints["ours"], new, "dcp", progress=interrupted_after(4))
    os.truncate(new / "__1_0.distcp", 10)
    (new / "part_00002.metadata").write_bytes(b"rubbish")
    convert(dcp_checkpoints["ours"], new, "dcp")
    assert compare(dcp_checkpoints["ours"], new).is_equal and ckpt_fast.verify(new).is_sound


@pytest.mark.parametrize("to", ["dcp", "torch_dist", "safetensors"])
def test_what_is_there_already_stays(to: Any, dcp_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    new = tmp_path / "new"
    convert(dcp_checkpoints["ours"], new, to)
    before = {path.name: path.stat().st_ino for path in new.iterdir()}
    assert convert(dcp_checkpoints["ours"], new, to).resumed
    for source in (dcp_checkpoints["stock"], tmp_path / "other"):
        if source.name == "other":
            ckpt_fast.save({"w": torch.ones(3)}, source, no_dist=True)
        ran = in_pipe("convert", source, new, "--to", to)
        assert ran.status == 2 and "name another directory" in ran.err
    assert {path.name: path.stat().st_ino for path in new.iterdir()} == before


def test_what_cannot_be_converted(
    dcp_checkpoints: dict[str, Path], local_checkpoint: Path, tmp_path: Path
) -> None:
    ran = in_pipe("convert", local_checkpoint, tmp_path / "new", "--to", "dcp")
    assert ran.status == 2 and "local checkpoint" in ran.err
    assert in_pipe("convert", tmp_path / "nowhere", tmp_path / "new", "--to", "dcp").status == 2
    assert in_pipe("convert", dcp_checkpoints["ours"], tmp_path / "new", "--to", "zip").status == 2
    assert in_pipe("convert", dcp_checkpoints["ours"], dcp_checkpoints["ours"], "--to", "dcp").status == 2
    with pytest.raises(CheckpointWriteError):
        convert(dcp_checkpoints["ours"], "msc://bucket/x", "dcp")
    dcp.save(
        {"c": torch.ones(3, dtype=torch.complex64)},
        storage_writer=dcp.FileSystemWriter(tmp_path / "complex"),
        no_dist=True,
    )
    with pytest.raises(CheckpointMismatchError, match="complex64"):
        convert(tmp_path / "complex", tmp_path / "new", "safetensors")
    assert not (tmp_path / "new").exists()
