# SPDX-License-Identifier: Apache-2.0
"""Hugging Face weights as the start of a run and as a copy beside checkpoints.

Megatron Bridge, which converts them, is not in either test environment. A stand-in with the documented
methods of its AutoBridge replaces it; it stores weights under Megatron's names, in one file.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_fast import compat
from tests.helpers import run_ranks
from tests.models import Run, Setup, differences, identical, other
from tests.trainer.training import error_of, iterations, require, tracked

SETUP = Setup(bf16=True, distributed=True)
WEIGHTS = "pytorch_model.bin"

STAND_IN = """
import json, os
import torch
import torch.distributed as dist

class AutoBridge:
    def __init__(self, path, trust_remote_code):
        self.path, self.trust = path, trust_remote_code
        self._model_bridge = self
        self.SUPPORTS_HF_PRETRAINED_EXPORT = "closed" not in str(path)

    @classmethod
    def from_hf_pretrained(cls, path, **kwargs):
        return cls(path, **kwargs)

    def load_hf_weights(self, model, hf_path=None, allowed_mismatched_params=None):
        weights = torch.load(os.path.join(hf_path or self.path, "pytorch_model.bin"), weights_only=True)
        with torch.no_grad():
            for name, parameter in model[0].named_parameters():
                parameter.copy_(weights[name])

    def save_hf_pretrained(self, model, path, show_progress=True, source_path=None, strict=True,
                           merge_adapter_weights=True, distributed_save=False, save_every_n_ranks=1,
                           weight_dtype=None):
        if os.path.exists("fail early") and dist.get_rank() == 1:
            raise RuntimeError("no room for the export")
        dist.barrier()
        if os.path.exists("fail") and dist.get_rank() == 1:
            raise RuntimeError("no room for the export")
        if dist.get_rank() == 0:
            torch.save(dict(model[0].named_parameters()), os.path.join(path, "pytorch_model.bin"))
            with open(os.path.join(path, "config.json"), "w") as file:
                json.dump([self.path, self.trust, distributed_save, save_every_n_ranks, show_progress], file)

    def save_hf_adapter(self, model, path, peft_config, base_model_name_or_path=None, show_progress=True,
                        exclude_adapter_base_prefixes=None):
        dist.barrier()
        if dist.get_rank() == 0:
            with open(os.path.join(path, "adapter_config.json"), "w") as file:
                json.dump([base_model_name_or_path, peft_config.name, show_progress], file)
"""


@pytest.fixture
def bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return where the stand-in is; the ranks run in ``tmp_path``."""
    package = tmp_path / "site/megatron/bridge"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "site")


@contextlib.contextmanager
def installed(site: str) -> Iterator[None]:
    """Make Megatron Bridge importable in this block."""
    sys.path.append(site)
    try:
        yield
    finally:
        sys.path.remove(site)
        sys.modules.pop("megatron.bridge", None)
        vars(sys.modules["megatron"]).pop("bridge", None)


# --- The start of a run ----------------------------------------------------------------------------------


def start_from_hf(rank: int, site: str, source: str) -> dict[str, Any]:
    with installed(site), Run(SETUP) as run:
        weights = dict(compat.unwrap_model(run.model)[0].named_parameters())
        if rank == 0:
            Path(source).mkdir()
            (Path(source) / "config.json").touch()
            torch.save(weights, os.path.join(source, WEIGHTS))
        expected = run.fingerprint()
        torch.distributed.barrier()
    with installed(site), Run(other(SETUP), pretrained_checkpoint=source, load="nothing") as run:
        run.train(2)
        before = run.fingerprint()
        skipped = run.load(skip_load_to_model_and_opt=True)
        untouched = differences(before, run.fingerprint(), "train_state", "optimizer")
        result = run.load()
        loaded = run.fingerprint()
        # Copies the master weights into the model, which must change nothing.
        for member in run.optimizer.chained_optimizers:
            member._copy_main_params_to_model_params()
        run.model[0].start_param_sync(force_sync=True)
        return {
            "results": (skipped, result, run.state.train_state.step),
            "untouched": untouched,
            "model": [name for name in differences(expected, loaded) if name.startswith("model.")],
            "masters": differences(loaded, run.fingerprint()),
        }


def test_hf_directory_as_pretrained_checkpoint(tmp_path: Path, bridge: str) -> None:
    for found in run_ranks(start_from_hf, 2, bridge, str(tmp_path / "model")):
        assert found == {"results": ((0, 0), (0, 0), 0), "untouched": [], "model": [], "masters": []}


def hf_errors(rank: int, source: str) -> list[tuple[str, str]]:
    with Run(SETUP, load=source) as run:
        resumed = error_of(run.load)
        run.checkpoint.load = os.path.dirname(source)
        named = error_of(run.load)
        run.checkpoint.load, run.checkpoint.pretrained_checkpoint = None, source
        return [resumed, named, error_of(run.load)]


def test_hf_directories_that_cannot_be_loaded(tmp_path: Path) -> None:
    source = tmp_path / "iter_0000007"
    source.mkdir()
    (source / "config.json").touch()
    (source / "model.safetensors").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    for resumed, named, without_bridge in run_ranks(hf_errors, 2, str(source)):
        require(resumed, "ValueError", "checkpoint.load does not support HuggingFace-format directories")
        require(named, "NotImplementedError", "format hf not supported", str(source), "pretrained_checkpoint")
        require(without_bridge, "UnavailableError", "megatron.bridge.AutoBridge", "install megatron-bridge")


# --- A copy beside checkpoints ---------------------------------------------------------------------------


def save_with_copies(rank: int, site: str) -> dict[str, Any]:
    """Save the model and adapters, then what cannot be exported, and with a failing rank."""
    config = {"also_save_hf_checkpoint": True, "hf_source_path": "org/model", "hf_trust_remote_code": True}
    with installed(site), Run(SETUP, save="run", hf_save_every_n_ranks=2, **config) as run:
        run.train(1)
        stale = Path("run/iter_0000001/hf/model-00002-of-00002.safetensors")
        if rank == 0:
            stale.parent.mkdir(parents=True)
            stale.touch()
        torch.distributed.barrier()
        run.save()
        saved = dict(compat.unwrap_model(run.model)[0].named_parameters())
        copied = torch.load(f"run/iter_0000001/hf/{WEIGHTS}", weights_only=False)
        found = {"copied": all(identical(saved[name].detach(), copied[name].detach()) for name in saved)}
        run.state.cfg.peft = SimpleNamespace(name="lora", adapter_key_filter=lambda key: True)
        run.train(1)
        run.save()
        run.state.cfg.peft = None
        run.checkpoint.hf_source_path = "org/closed"
        found["closed"] = error_of(run.save)
        run.checkpoint.hf_source_path = None
        found["no source"] = error_of(run.save)
        run.checkpoint.hf_source_path = "org/model"
        if rank == 0:
            Path("fail").touch()
        torch.distributed.barrier()
        run.train(1)
        found["failed"] = error_of(run.save)
        return found


def test_copies_beside_checkpoints(tmp_path: Path, bridge: str) -> None:
    for found in run_ranks(save_with_copies, 2, bridge):
        assert found["copied"]
        require(found["closed"], "NotImplementedError", "standalone Hugging Face", "org/closed")
        require(found["no source"], "ValueError", "HF source", "checkpoint.hf_source_path")
        require(found["failed"], "CheckpointError", "rank 1:", "no room for the export")
    first, second = (tmp_path / f"run/iter_000000{step}" for step in (1, 2))
    assert sorted(path.name for path in (first / "hf").iterdir()) == ["config.json", WEIGHTS]
    assert (first / "hf/config.json").read_text() == '["org/model", true, false, 2, false]'
    assert (second / "hf/adapter_config.json").read_text() == '["org/model", "lora", false]'
    # A failed copy fails the save before anything is staged, and leaves nothing that looks like a model.
    assert tracked(str(tmp_path / "run")) == (2, 2)
    assert iterations(str(tmp_path / "run")) in ([1, 2], [1, 2, 3])
    assert not (tmp_path / "run/iter_0000003/hf").exists()


def export_with_a_rank_missing(rank: int, site: str) -> tuple[str, str]:
    config = {"also_save_hf_checkpoint": True, "hf_source_path": "org/model", "on_save_error": "warn"}
    with installed(site), Run(SETUP, save="run", **config) as run:
        run.train(1)
        Path("fail early").touch()
        return error_of(run.save)


def test_no_rank_waits_for_one_that_failed_between_collectives(
    tmp_path: Path, bridge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even ``on_save_error="warn"`` lets training continue: the ranks are out of step."""
    monkeypatch.setenv("CKPT_FAST_TIMEOUT", "1")
    for error in run_ranks(export_with_a_rank_missing, 2, bridge, fresh=True, timeout_s=60):
        require(
            error, "RuntimeError", "rank 1:", "no room for the export", "run/iter_0000001/hf", "end this job"
        )
    assert not (tmp_path / "run/iter_0000001/hf").exists()
    assert tracked(str(tmp_path / "run")) is None


def save_without_bridge(rank: int) -> tuple[str, str]:
    with Run(SETUP, save="run", also_save_hf_checkpoint=True, hf_source_path="org/model") as run:
        return error_of(run.save)


def test_copies_without_megatron_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for error in run_ranks(save_without_bridge, 2):
        require(error, "UnavailableError", "megatron.bridge.AutoBridge", "also_save_hf_checkpoint=False")
    assert not (tmp_path / "run").exists()
