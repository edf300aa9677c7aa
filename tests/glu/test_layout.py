# SPDX-License-Identifier: Apache-2.0
"""The order in which rows are stored: recorded, assumed or overridden; what cannot be ordered is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from ckpt_fast import compat
from ckpt_fast.config import CheckpointConfig
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu.layout import (
    LOCAL_SIZES_KEY,
    ContiguousChunk,
    require_same_fsdp_optimizer,
    rows_in_stored_order,
    sizes_to_undo,
)
from ckpt_fast.glu.model import _deinterleave_glu_tensor, _interleave_glu_tensor
from tests.helpers import run_ranks
from tests.interop.saved import save_with_stock
from tests.models import Run, Setup, differences, other
from tests.trainer.training import error_of, iterations, parts, require

SIZES = (4, 2)
NONE = (None, None)
BUCKETS = Setup(bf16=True, distributed=True, glu=SIZES)
KEY = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.fixture(autouse=True)
def dense_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_ACT_FUSION_FOR_DENSE", "1")


def save_in_buckets(rank: int, root: str) -> dict[str, Any]:
    """Save and load an optimizer whose sharding does not know rows; return the outcome of each."""
    ours, plain = os.path.join(root, "ours"), os.path.join(root, "plain")
    with Run(BUCKETS, save=ours) as run:
        run.train(1)
        found: dict[str, Any] = {"save": error_of(run.save), "left": iterations(ours)}
        run.checkpoint.save_optim = False
        run.save()
        run.checkpoint.save_optim = True
        expected = run.fingerprint()
        save_with_stock(run, os.path.join(root, "stock"), None)
    with Run(replace(BUCKETS, glu=NONE), save=plain) as run:
        run.train(1)
        run.save()
    with Run(other(BUCKETS), load=ours) as run:
        run.load()
        found["weights"] = [
            name for name in differences(expected, run.fingerprint()) if name.startswith("model.")
        ]
    with Run(other(BUCKETS), load=plain) as run:
        found["load"] = error_of(run.load)
        run.checkpoint.load_optim = False
        found["without optimizer"] = run.load()[0]
    with Run(other(BUCKETS), load=os.path.join(root, "stock"), load_glu_rows="interleaved") as run:
        run.load()
        found["in memory order"] = differences(expected, run.fingerprint())
    return found


def test_optimizer_state_that_hides_its_rows_is_refused(tmp_path: Path) -> None:
    for found in run_ranks(save_in_buckets, 2, str(tmp_path)):
        words = ("dp_reshardable", "no regard to rows")
        require(
            found.pop("save"), "CheckpointMismatchError", *words, "dist_ckpt_optim_fully_reshardable=True"
        )
        require(found.pop("load"), "CheckpointMismatchError", *words, "load_optim=False", "load_glu_rows")
        assert found == {"left": [], "weights": [], "without optimizer": 1, "in memory order": []}


def load_what_a_stock_save_left_interleaved(rank: int, root: str) -> dict[str, Any]:
    setup = Setup(glu=SIZES)
    with Run(setup) as run:
        run.train(1)
        saved = run.fingerprint()
        save_with_stock(run, root, None)
    found = {}
    for order in ("recorded", "contiguous", "interleaved"):
        with Run(other(setup), load=root, load_glu_rows=order) as run:
            run.train(1)
            run.load()
            wrong = differences(saved, run.fingerprint())
            found[order] = parts(wrong) & {"model", "optimizer"}
    return found


def test_a_setting_overrides_what_is_assumed(tmp_path: Path) -> None:
    (found,) = run_ranks(load_what_a_stock_save_left_interleaved, 1, str(tmp_path))
    both = {"model", "optimizer"}
    assert found == {"recorded": both, "contiguous": both, "interleaved": set()}


RUN = {"model": {"moe_mlp_glu_interleave_size": 4, "moe_shared_expert_glu_interleave_size": 2}}
OTHER_RUN = {"model": {"moe_mlp_glu_interleave_size": 8}}
OLD_RUN: dict[str, Any] = {"model": {}}


@pytest.mark.parametrize(
    ("metadata", "run_config", "order", "undone"),
    [
        ({}, None, "recorded", SIZES),
        ({}, RUN, "recorded", SIZES),
        ({"glu_rows": "contiguous"}, OTHER_RUN, "recorded", SIZES),
        ({"glu_rows": "interleaved"}, RUN, "recorded", NONE),
        ({"glu_rows": "interleaved"}, RUN, "contiguous", SIZES),
        ({}, None, "interleaved", NONE),
        ({}, OLD_RUN, "interleaved", NONE),
        ({"glu_rows": "contiguous"}, RUN, "interleaved", NONE),
    ],
)
def test_the_loader_follows_the_record(
    metadata: dict[str, Any], run_config: Any, order: str, undone: tuple[int | None, int | None]
) -> None:
    assert sizes_to_undo(metadata, run_config, SimpleNamespace(load_glu_rows=order), SIZES) == undone


def test_a_checkpoint_that_does_not_say_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    for metadata, run_config, lines in (({}, RUN, 1), ({}, OLD_RUN, 0), ({"glu_rows": "contiguous"}, RUN, 0)):
        caplog.clear()
        sizes_to_undo(metadata, run_config, None, NONE)
        assert caplog.text.count("load_glu_rows='interleaved'") == lines


def test_orders_that_do_not_fit_are_refused() -> None:
    interleaved = SimpleNamespace(load_glu_rows="interleaved")
    with pytest.raises(CheckpointMismatchError, match=r"\(8, None\); this run has \(4, 2\)"):
        sizes_to_undo({}, OTHER_RUN, interleaved, SIZES)
    with pytest.raises(CheckpointMismatchError, match="order 'diagonal'"):
        sizes_to_undo({"glu_rows": "diagonal"}, RUN, None, SIZES)
    with pytest.raises(CheckpointMismatchError, match=r"optimizer state.*load_optim=False"):
        require_same_fsdp_optimizer(OTHER_RUN, SIZES)
    require_same_fsdp_optimizer(RUN, SIZES)
    require_same_fsdp_optimizer(None, SIZES)
    with pytest.raises(ValueError, match="load_glu_rows='mixed'"):
        CheckpointConfig(load_glu_rows="mixed").finalize()  # type: ignore[arg-type]


def prepared(section: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return rows_in_stored_order(
        {"model": section, **rest}, SIZES, is_local=False, is_arranged=False, use_megatron_fsdp=False
    )


def test_a_state_dict_built_by_the_caller() -> None:
    rows = torch.arange(32.0).reshape(16, 2)
    expected = _deinterleave_glu_tensor(rows, 4)
    tensor = compat.ShardedTensor.from_rank_offsets(KEY, rows)
    factory = apply_swiglu_sharded_factory(tensor, ())
    moment = compat.ShardedTensorFactory(f"optimizer.{KEY}", rows, factory.build_fn, factory.merge_fn)
    section = {KEY: factory, f"{KEY}1": factory.build(), f"{KEY}2": rows, "other": tensor}
    result = prepared(section, optimizer={"state": {0: {"exp_avg": moment}}, "step": 1})
    for entries in (
        result["model"][KEY].build(),
        result["model"][f"{KEY}1"],
        result["optimizer"]["state"][0]["exp_avg"].build(),
    ):
        assert torch.equal(torch.cat([entry.data for entry in entries]), expected)
    assert torch.equal(result["model"][f"{KEY}2"], expected)
    assert result["model"]["other"] is tensor and result["optimizer"]["step"] == 1
    assert section[KEY] is factory
    with pytest.raises(CheckpointMismatchError, match="prebuilt state dict"):
        prepared({}, optimizer={"exp_avg": factory.build()})


def test_local_checkpoints_keep_what_is_in_memory() -> None:
    state = {"model": {KEY: torch.zeros(16, 2)}}
    result = rows_in_stored_order(state, SIZES, is_local=True, is_arranged=False, use_megatron_fsdp=False)
    assert result["model"] is state["model"] and result[LOCAL_SIZES_KEY] == [4, 2]


class Chunk:
    """A chunk with values that no sharded state dict can fill in place."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def sharded_state_dict(self, **_: Any) -> dict[str, Any]:
        return {KEY: compat.ShardedObject("k", self.rows, (1,), (0,)), f"{KEY}1": self.rows, "other": 1}


def test_values_that_are_loaded_whole_are_reordered_afterwards() -> None:
    rows = torch.arange(32.0).reshape(16, 2)
    saved = ContiguousChunk(Chunk(rows), SIZES, is_loading=False).sharded_state_dict()
    contiguous = _deinterleave_glu_tensor(rows, 4)
    assert torch.equal(saved[KEY].data, contiguous) and torch.equal(saved[f"{KEY}1"], contiguous)
    loading = ContiguousChunk(Chunk(rows), SIZES, is_loading=True)
    assert loading.sharded_state_dict()[KEY].data is rows
    section = {KEY: contiguous, f"{KEY}1": contiguous, "other": 1}
    loading.reorder_late(section)
    assert torch.equal(section[KEY], _interleave_glu_tensor(contiguous, 4))  # type: ignore[arg-type]
    assert torch.equal(section[f"{KEY}1"], rows) and section["other"] == 1  # type: ignore[arg-type]
