# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast diff``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast.format.types import TensorShard
from ckpt_fast.tools import diff
from tests.cli.running import in_pipe, on_terminal, state
from tests.saves import save


def stock(path: Path, values: dict[str, Any]) -> Path:
    dcp.save(values, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    return path


def test_ours_and_stock_of_one_state_are_equal(
    dcp_checkpoints: dict[str, Path], runs: dict[str, Path]
) -> None:
    for a, b in ((dcp_checkpoints["ours"], dcp_checkpoints["stock"]), (runs["ours"], runs["stock"])):
        ran = in_pipe("diff", a, b)
        assert (ran.status, ran.err) == (0, ""), ran.out
        assert ran.out.startswith("equal: ")
        value = in_pipe("diff", a, b, "--json").value
        assert value["equal"] and value["tensors"] > 3 and value["objects"] > 0


def test_every_kind_of_difference(dcp_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = state()
    other["model"]["weight"][2, 3] += 8
    other["model"]["half"] = other["model"]["half"].float()
    other["model"]["scale"] = torch.ones(2)
    other["step"] = torch.tensor(7)
    other["optimizer"]["groups"][1]["lr"] = 0.3
    del other["model"]["empty"]
    other["more"] = torch.ones(1)
    for a in (dcp_checkpoints["ours"], dcp_checkpoints["stock"]):
        ran = in_pipe("diff", a, stock(tmp_path / a.name, other), "--json")
        assert ran.status == 1
        found = {each["name"]: each for each in ran.value["differences"]}
        assert {name: each["kind"] for name, each in found.items()} == {
            "model.weight": "values",
            "model.half": "dtype",
            "model.scale": "shape",
            "model.empty": "only in A",
            "more": "only in B",
            "step": "kind",
            "optimizer.groups.1.lr": "object",
        }
        weight, before = found["model.weight"], float(state()["model"]["weight"][2, 3])
        assert weight["elements"] == 1 and math.isclose(weight["max_abs"], 8.0, rel_tol=1e-6)
        relative = 8 / max(abs(before), abs(before + 8))
        assert math.isclose(weight["max_rel"], relative, rel_tol=1e-6)
        assert found["model.half"]["max_abs"] == 0.0, "bfloat16 as float32 has the same values"
        assert "0.2 in A and 0.3 in B" in found["optimizer.groups.1.lr"]["detail"]
        shown = on_terminal("diff", a, tmp_path / a.name)
        assert shown.status == 1 and "7 differences" in shown.text


def test_bits_and_not_a_number(tmp_path: Path) -> None:
    values = torch.tensor([0.0, math.nan, 1.0])
    others = torch.tensor([-0.0, math.nan, 1.0])
    a = stock(tmp_path / "a", {"zero": values, "nan": torch.tensor([1.0, 2.0])})
    b = stock(tmp_path / "b", {"zero": others, "nan": torch.tensor([1.0, math.nan])})
    found = {each.name: each for each in diff.compare(a, b).differences}
    assert (found["zero"].elements, found["zero"].max_abs) == (0, 0.0)
    assert (found["nan"].elements, found["nan"].max_abs) == (1, math.inf)
    assert diff.compare(a, a).is_equal
    assert '"max_abs": "inf"' in in_pipe("diff", a, b, "--json").out


@pytest.mark.parametrize("kind", ["dense", "windows"])
def test_other_shards(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows in one, by columns in the other, whole in the third; also where windows are smaller."""
    if kind == "windows":
        monkeypatch.setattr(diff, "_PIECE_NBYTES", 1000)
    whole = torch.arange(120.0 * 70).view(120, 70)

    def shards(*boxes: tuple[slice, slice]) -> list[TensorShard]:
        return [
            TensorShard("w", whole[rows, columns], (rows.start or 0, columns.start or 0), (120, 70))
            for rows, columns in boxes
        ]

    everything = slice(None)
    save(shards((slice(0, 50), everything), (slice(50, 120), everything)), str(tmp_path / "rows"))
    save(shards((everything, slice(0, 33)), (everything, slice(33, 70))), str(tmp_path / "columns"))
    stock(tmp_path / "whole", {"w": whole})
    places = [tmp_path / name for name in ("rows", "columns", "whole")]
    assert all(diff.compare(a, b).is_equal for a in places for b in places)
    whole[71, 40] += 1
    stock(tmp_path / "other", {"w": whole})
    for place in places:
        (found,) = diff.compare(place, tmp_path / "other").differences
        assert (found.elements, found.max_abs) == (1, 1.0)


def test_damage_and_what_is_missing(dcp_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    ours = dcp_checkpoints["ours"]
    assert in_pipe("diff", ours, tmp_path).status == 2
    ckpt_fast.save(state(), tmp_path / "damaged", no_dist=True)
    file = tmp_path / "damaged" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ran = in_pipe("diff", ours, tmp_path / "damaged")
    assert ran.status == 1 and "CRC" in ran.err


def test_the_common_state_is_compared(runs: dict[str, Path]) -> None:
    a, b = (runs["ours"] / f"iter_000000{number}" for number in (1, 2))
    found = {each.name: each for each in diff.compare(a, b).differences}
    assert found["common state"].kind == "object" and "in A" in found["common state"].detail
