# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast inspect``."""

from __future__ import annotations

import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import ckpt_fast
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError, UnsafeCheckpointError
from ckpt_fast.format.types import TensorShard
from tests.cli.running import in_pipe, on_terminal, state
from tests.saves import save


@pytest.mark.parametrize(
    ("name", "kind", "writer"),
    [("ours", "dcp", "ckpt_fast"), ("stock", "dcp", "another library"), ("fsdp", "fsdp_dtensor", None)],
)
def test_files_of_torch_dcp(
    name: str, kind: str, writer: str | None, dcp_checkpoints: dict[str, Path]
) -> None:
    found = in_pipe("inspect", dcp_checkpoints[name], "--json")
    assert found.status == 0
    value = found.value
    assert value["format"] == kind
    assert writer is None or value["writer"] == writer
    by_name = {each["name"]: each for each in value["tensors"]}
    weight = by_name["model.weight"]
    assert (weight["dtype"], weight["shape"], weight["nbytes"], weight["shards"]) == (
        "float32",
        [60, 50],
        12_000,
        1,
    )
    assert by_name["model.half"]["dtype"] == "bfloat16"
    assert by_name["model.empty"]["nbytes"] == 0
    assert "step" in {each["name"] for each in value["objects"]}


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_a_directory_of_checkpoints_stands_for_the_selected_one(writer: str, runs: dict[str, Path]) -> None:
    root = runs[writer]
    value = in_pipe("inspect", root, "--json").value
    assert value["path"] == str(root / "iter_0000003") and value["iteration"] == 3
    assert value["format"] == "torch_dist" and value["versions"]["torch_dist"] == "1"
    shards = {each["name"]: each["shards"] for each in value["tensors"]}
    assert shards["embedding.word_embeddings.weight"] == 2, "two tensor-parallel ranks"
    if writer == "ours":
        assert value["versions"]["ckpt_fast"] == ckpt_fast.__version__
        assert value["versions"]["torch"] == torch.__version__


def test_a_local_checkpoint(local_checkpoint: Path) -> None:
    value = in_pipe("inspect", local_checkpoint, "--json").value
    assert (value["format"], value["iteration"], value["writer"]) == ("local", 4, "ckpt_fast")
    assert len(value["tensors"]) > 3 and [each["name"] for each in value["objects"]] == ["state_dict"]


def test_pipe_and_terminal(dcp_checkpoints: dict[str, Path]) -> None:
    path = dcp_checkpoints["stock"]
    plain = in_pipe("inspect", path)
    assert "\x1b" not in plain.out
    rows = [line.split() for line in plain.out.splitlines()]
    assert ["model.weight", "float32", "[60,", "50]", "12", "kB", "1"] in rows
    shown = on_terminal("inspect", path)
    assert "\x1b" in shown.out and "└── weight  float32 [60, 50]  12 kB" in shown.text


def test_depth_adds_up(dcp_checkpoints: dict[str, Path]) -> None:
    rows = [
        line.split() for line in in_pipe("inspect", dcp_checkpoints["ours"], "--depth", "1").out.splitlines()
    ]
    assert ["model.*", "4", "entries", "12", "kB", "4"] in rows


@pytest.mark.parametrize("name", ["ours", "stock"])
def test_statistics_of_a_tensor(name: str, dcp_checkpoints: dict[str, Path]) -> None:
    value = in_pipe("inspect", dcp_checkpoints[name], "--tensor", "model.weight", "--json").value
    weight = state()["model"]["weight"].double()
    assert value["count"] == weight.numel() and value["zeros"] == 0
    assert value["minimum"] == weight.min() and value["maximum"] == weight.max()
    assert math.isclose(value["mean"], weight.mean(), rel_tol=1e-9)
    assert math.isclose(value["std"], weight.std(correction=0), rel_tol=1e-9)
    assert "maximum" in on_terminal("inspect", dcp_checkpoints[name], "--tensor", "model.weight").text


def test_statistics_over_windows_and_what_is_not_finite(tmp_path: Path) -> None:
    values = torch.linspace(-1e6, 3e6, 3 << 20, dtype=torch.float64)
    values[5], values[7], values[11] = math.nan, math.inf, 0.0
    ckpt_fast.save({"w": values, "none": torch.full((3,), math.nan)}, tmp_path / "c", no_dist=True)
    found = in_pipe("inspect", tmp_path / "c", "--tensor", "w", "--json").value
    finite = values[torch.isfinite(values)]
    assert (found["nans"], found["infinities"], found["zeros"]) == (1, 1, 1)
    assert math.isclose(found["mean"], finite.mean(), rel_tol=1e-9)
    assert math.isclose(found["std"], finite.std(correction=0), rel_tol=1e-9)
    assert in_pipe("inspect", tmp_path / "c", "--tensor", "none", "--json").value["mean"] == "nan"


def test_what_cannot_be_inspected(tmp_path: Path, dcp_checkpoints: dict[str, Path]) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty", __file__):
        ran = in_pipe("inspect", path)
        assert ran.status == 2 and str(path) in ran.err and "Traceback" not in ran.err
        with pytest.raises(CheckpointNotFoundError):
            ckpt_fast.inspect(path)
    for name in ("model.nothing", "step"):
        ran = in_pipe("inspect", dcp_checkpoints["ours"], "--tensor", name)
        assert ran.status == 2 and name in ran.err


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    save([TensorShard("w", torch.ones(3), (0,), (3,))], str(tmp_path))
    path = tmp_path / ".metadata"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert in_pipe("inspect", tmp_path).status == 1
    with pytest.raises(CheckpointCorruptError):
        ckpt_fast.inspect(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return open, ("evil", "w")


def test_no_code_of_a_checkpoint_is_run(
    tmp_path: Path, dcp_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "evil_checkpoint"
    shutil.copytree(dcp_checkpoints["stock"], evil)
    (evil / ".metadata").write_bytes(pickle.dumps(Evil()))
    convert = ["convert", evil, tmp_path / "converted", "--to", "dcp"]
    for command in (["inspect", evil], ["diff", evil, evil], convert):
        assert in_pipe(*command).status == 2
    with pytest.raises(UnsafeCheckpointError):
        ckpt_fast.inspect(evil)
    assert not (tmp_path / "evil").exists()
