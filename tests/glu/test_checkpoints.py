# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of models with interleaved fc1 rows are the same as those of equal models without."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from ckpt_fast import compat
from ckpt_fast.checkpointing import _load_model_weights_from_checkpoint, maybe_finalize_async_save
from tests.glu.models import contiguous_parameters
from tests.helpers import run_ranks
from tests.interop.saved import read_with_dcp
from tests.manifests import manifest_of
from tests.models import FLOPS, Run, Setup, differences, identical, megatron_on_cpu, other

SIZES = (4, 2)
DENSE = Setup()
DISTRIBUTED = Setup(bf16=True, distributed=True, reshardable=True, experts=2)


@pytest.fixture(autouse=True)
def dense_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_ACT_FUSION_FOR_DENSE", "1")


def iteration(root: str) -> str:
    return os.path.join(root, "iter_0000002")


def save_in_the_background(run: Run) -> None:
    run.state.initialize_async_checkpoint_worker()
    run.save()
    with torch.no_grad():
        for parameter in run.model[0].parameters():
            parameter.add_(1.0)  # training continues
    maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)


def there_and_back(rank: int, setup: Setup, root: str) -> dict[str, Any]:
    """Plain run -> interleaved run -> plain and interleaved runs; return the outcome of each step."""
    plain, found = os.path.join(root, "plain"), {}
    again, background = os.path.join(root, "again"), os.path.join(root, "background")
    glu = replace(other(setup), glu=SIZES)
    with Run(setup, save=plain) as run:
        run.train(2)
        run.save()
        saved = run.fingerprint()
        losses = run.train(2)
    with Run(glu, load=plain, save=again) as run:
        run.train(1)
        found["loaded"] = run.load()
        run.save()
        found["same model"] = differences(
            {name: value for name, value in saved.items() if name.startswith("model.")},
            contiguous_parameters(run.model, SIZES),
        )
        mine = run.train(2)
        future = run.fingerprint()
        found["same losses"] = torch.allclose(torch.tensor(mine), torch.tensor(losses), rtol=1e-2)
    with Run(glu, load=again, save=background, async_save=True, async_strategy="mcore") as run:
        run.state.cfg.ddp = None  # as in programs that do not train
        run.load()
        save_in_the_background(run)
    with Run(glu, load=background) as run:
        run.load()
        found["resumed"] = run.train(2) == mine, differences(future, run.fingerprint())
        for parameter in run.model[0].parameters():
            parameter.data.zero_()
        _load_model_weights_from_checkpoint(iteration(again), run.model)
        found["weights"] = differences(
            {name: value for name, value in saved.items() if name.startswith("model.")},
            contiguous_parameters(run.model, SIZES),
        )
    with Run(other(setup), load=background) as run:
        run.load()
        found["back"] = differences(saved, run.fingerprint())
        found["stock"] = loaded_by_stock_code(run, iteration(again), saved)
    return found


def loaded_by_stock_code(run: Run, directory: str, saved: dict[str, Any]) -> list[str]:
    """Return the model tensors that stock Megatron-Core does not load as in ``saved``."""
    chunk = compat.unwrap_model(run.model)[0]
    for parameter in run.model[0].parameters():
        parameter.data.zero_()
    with megatron_on_cpu():
        groups = compat.get_pg_collection(run.model)
        wanted = chunk.sharded_state_dict(metadata={**run.content_metadata(), "dp_cp_group": groups.dp_cp})
        loaded = dist_checkpointing.load({"model": wanted}, directory)["model"]
    return [
        name
        for name, _ in chunk.named_parameters()
        if not identical(saved[f"model.{name}"], loaded[_without_wrapper(name, loaded)].detach())
    ]


def _without_wrapper(name: str, state: dict[str, Any]) -> str:
    return name if name in state else name.removeprefix("module.")


@pytest.mark.parametrize(
    "ranks, setup",
    [
        pytest.param(1, DENSE, id="dense", marks=pytest.mark.long),
        pytest.param(2, Setup(tp=2, bf16=True, layers=2), id="dense-tp2"),
        pytest.param(2, DISTRIBUTED, id="mixture-dp2-distributed"),
        pytest.param(2, Setup(tp=2, bf16=True, experts=2), id="mixture-tp2", marks=pytest.mark.long),
    ],
)
def test_interleaving_leaves_no_trace_in_the_checkpoint(tmp_path: Path, ranks: int, setup: Setup) -> None:
    for found in run_ranks(there_and_back, ranks, setup, str(tmp_path)):
        assert found == {
            "loaded": (2, FLOPS),
            "same model": [],
            "same losses": True,
            "resumed": (True, []),
            "weights": [],
            "back": [],
            "stock": [],
        }
    states = {
        name: read_with_dcp(iteration(str(tmp_path / name))) for name in ("plain", "again", "background")
    }
    tensors = [name for name, value in states["plain"].items() if isinstance(value, torch.Tensor)]
    rows = [name for name in tensors if "linear_fc1.weight" in name]
    kinds = ("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "decoder.")
    assert all(any(name.startswith(kind) for name in rows) for kind in kinds)
    for name in ("again", "background"):
        assert states[name].keys() == states["plain"].keys()
        assert [each for each in tensors if not identical(states["plain"][each], states[name][each])] == []
        notes = manifest_of(Path(iteration(str(tmp_path / name)))).notes
        assert notes["glu_rows"] == "contiguous"
        common = torch.load(Path(iteration(str(tmp_path / name))) / "common.pt", weights_only=False)
        assert common["content_metadata"]["glu_rows"] == "contiguous"
