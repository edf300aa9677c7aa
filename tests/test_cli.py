# SPDX-License-Identifier: Apache-2.0
"""The command ``ckpt-fast verify``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_fast.cli import main
from ckpt_fast.format.types import TensorShard
from tests.saves import save


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    weight = torch.arange(20_000, dtype=torch.float32).view(100, 200)
    directory = str(tmp_path / "iter_0000001")
    save([TensorShard("weight", weight, (0, 0), (100, 200))], directory)
    return directory


def test_verify_a_whole_checkpoint(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--deep", checkpoint]) == 0
    assert capsys.readouterr().out == f"{checkpoint}: ok\n"
    assert main(["verify", checkpoint]) == 0
    assert capsys.readouterr().out == f"{checkpoint}: ok (structure and lengths; --deep reads every byte)\n"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_verify_names_the_file_with_a_flipped_bit(
    checkpoint: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = os.path.join(checkpoint, name)
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 3] ^= 4
    Path(path).write_bytes(content)
    assert main(["verify", "--deep", checkpoint]) == 1
    error = capsys.readouterr().err
    assert path in error and "CRC-32" in error


def test_verify_names_the_file_that_is_missing_or_short(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = os.path.join(checkpoint, "__0_0.distcp")
    os.truncate(path, 1000)
    assert main(["verify", checkpoint]) == 1
    assert f"{path} has 1000 bytes instead of" in capsys.readouterr().err
    os.unlink(path)
    assert main(["verify", checkpoint]) == 1
    assert f"{path} is missing" in capsys.readouterr().err


@pytest.mark.parametrize("deep", [[], ["--deep"]])
@pytest.mark.parametrize("change", ["missing", "empty", "altered"])
def test_verify_looks_at_the_small_files_too(
    tmp_path: Path, change: str, deep: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save([TensorShard("w", torch.ones(3), (0,), (3,))], str(tmp_path), seal_files={"metadata.json": b"{}"})
    seal = tmp_path / "metadata.json"
    seal.unlink()
    if change != "missing":
        seal.write_bytes(b"" if change == "empty" else b"[]")
    assert main(["verify", *deep, str(tmp_path)]) == 1
    assert str(seal) in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_verify_what_is_not_our_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = str(tmp_path / "stock")
    dcp.save({"w": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(stock))
    assert main(["verify", "--deep", stock]) == 0
    text, empty = tmp_path / "text", tmp_path / "empty"
    text.write_text("not a checkpoint")
    empty.mkdir()
    for path in (text, empty, tmp_path / "nowhere"):
        assert main(["verify", str(path), stock]) == 2, "nothing is known of it, so it is not damaged"
        said = capsys.readouterr()
        assert f"{path}: no checkpoint\n{stock}: ok" in said.out and str(path) in said.err
    flip(Path(stock) / "__0_0.distcp", -500)
    assert main(["verify", "--deep", str(text), stock]) == 1


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_verify_a_directory_of_checkpoints(
    tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "iter_0000002"
    save([TensorShard("w", torch.ones(3), (0,), (3,))], str(other))
    (tmp_path / "iter_0000003").mkdir()  # of a save that has not ended
    assert main(["verify", "--deep", str(tmp_path)]) == 0
    first, second, third, run = capsys.readouterr().out.splitlines()
    assert (first, second) == (f"{checkpoint}: ok", f"{other}: ok")
    assert "iter_0000003: incomplete" in third and run == f"{tmp_path}: ok, 3 checkpoints"
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"")
    assert main(["verify", "--deep", str(tmp_path)]) == 1
    assert "latest_checkpointed_iteration.txt is empty" in capsys.readouterr().err


def test_verify_as_json(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(os.path.join(checkpoint, "__0_0.distcp"), 1000)
    assert main(["verify", "--json", checkpoint, str(tmp_path / "nowhere")]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["path"], first["sound"], first["deep"]) == (checkpoint, False, False)
    assert "has 1000 bytes" in first["damages"][0]
    assert second["sound"] is None and "does not exist" in second["error"]
