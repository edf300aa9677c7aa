# SPDX-License-Identifier: Apache-2.0
"""fsdp_dtensor checkpoints of FSDP2 models through the engine, synchronous and in the background."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.transformer import TransformerConfig

from ckpt_fast import FastStorageWriter, compat
from ckpt_fast.checkpointing import _create_fsdp_dtensor_storage_writer
from ckpt_fast.config import CheckpointConfig, ConfigContainer
from ckpt_fast.errors import AsyncSaveError, UnsafeCheckpointError
from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.trainer.contents import fsdp
from ckpt_fast.trainer.contexts import CheckpointType
from tests.doors.dcp import ranks as dcp_ranks
from tests.doors.dcp.states import differences
from tests.helpers import run_ranks
from tests.manifests import find_damage, manifest_lies
from tests.models import identical

pytestmark = [
    pytest.mark.skipif(not compat.HAVE_MEGATRON_FSDP, reason="needs Megatron FSDP"),
    pytest.mark.skipif(not dcp_ranks.FSDP2_ON_CPU, reason="FSDP2 of this torch needs a GPU"),
]


class Chunk(torch.nn.Module):
    """The attributes that determine which preprocessing a model needs."""

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)


def config(**checkpoint: Any) -> Any:
    return ConfigContainer(checkpoint=CheckpointConfig(ckpt_format="fsdp_dtensor", **checkpoint))


def state_of(run: dcp_ranks.Trained, seed: int = 0) -> dict[str, Any]:
    """Return the sections of a training run: uneven DTensors, objects and numbers."""
    state = run.state()
    return {
        "model": {**state["model"], **state["matrices"]},
        "optimizer": state["optimizer"],
        "iteration": 7,
        "rng_state": {"(0, 0)": [{"numpy": np.random.RandomState(seed).get_state(), "random": (3, (seed,))}]},
    }


def save_both_ways(rank: int, root: str) -> None:
    run = dcp_ranks.Trained(seed=0)
    whole = dcp_ranks._whole(state_of(run))
    if rank == 0:
        torch.save(whole, f"{root}/whole.pt")
    report: Any = fsdp.save_fsdp_dtensor(config(), [Chunk()], state_of(run), f"{root}/sync")
    assert report.nbytes > 0
    handle: Any = fsdp.save_fsdp_dtensor(
        config(async_save=True, save=root), [Chunk()], state_of(run), f"{root}/async"
    )
    dcp_ranks._scramble(state_of(run)["model"])
    queue = AsyncCallsQueue()
    queue.schedule_async_request(handle)
    queue.close()
    fsdp.save_fsdp_dtensor_checkpoint(
        f"{root}/writer", state_of(dcp_ranks.Trained(seed=0)), cfg=None, model=Chunk()
    )
    dcp.save(
        fsdp.preprocess_fsdp_dtensor_state_dict(None, state_of(dcp_ranks.Trained(seed=0)), Chunk()),
        storage_writer=dcp.FileSystemWriter(f"{root}/stock"),
    )


def load_all(rank: int, root: str, strict: bool) -> dict[str, Any]:
    """Load into another run; return which values differ, by directory. Stock reads ours as well."""
    expected = torch.load(f"{root}/whole.pt", weights_only=False)
    wrong: dict[str, Any] = {}
    for name in ("sync", "async", "writer", "stock"):
        run = dcp_ranks.Trained(seed=1)
        scaffold = {**state_of(run, seed=1), "_model": [Chunk()]}
        ckpt_cfg = config(strict_fsdp_dtensor_load=strict).checkpoint
        state, directory, release, kind = fsdp.load_fsdp_dtensor_checkpoint(
            root, ckpt_cfg, False, scaffold, None, checkpoint_path_override=f"{root}/{name}"
        )
        assert (directory, release, kind) == (f"{root}/{name}", False, CheckpointType.FSDP_DTENSOR)
        loaded = dcp_ranks._whole(state)
        wrong[name] = differences(
            {key: expected[key] for key in ("model", "optimizer")},
            {key: loaded[key] for key in ("model", "optimizer")},
        )
        assert loaded["iteration"] == 7
        assert identical(loaded["rng_state"], expected["rng_state"])
        again = dcp_ranks.Trained(seed=2)
        dcp.load(
            plain := {"model": state_of(again)["model"]},
            storage_reader=dcp.FileSystemReader(f"{root}/{name}"),
        )
        wrong[f"{name} by stock"] = differences({"model": expected["model"]}, dcp_ranks._whole(plain))
    return wrong


@pytest.fixture(scope="module")
def saved_both_ways(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved_both_ways")
    run_ranks(save_both_ways, 2, str(place))
    return place


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "partial"])
def test_what_was_saved_comes_back(saved_both_ways: Path, strict: bool) -> None:
    for name in ("sync", "async", "writer"):
        assert manifest_lies(saved_both_ways / name) == []
        assert find_damage(str(saved_both_ways / name)) == []
    for wrong in run_ranks(load_all, 2, str(saved_both_ways), strict):
        assert not any(wrong.values()), wrong


def save_to_object_storage(rank: int, url: str, directory: str) -> dict[str, Any]:
    """Save synchronously, in the background, and in the background over a checkpoint with a failing rank."""
    from multistorageclient.contrib.torch.filesystem import MultiStorageFileSystemWriter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat.MultiStorageClientFeature, "_enabled", True)
        run = dcp_ranks.Trained(seed=0)
        whole = copy.deepcopy(dcp_ranks._whole(state_of(run)))
        fsdp.save_fsdp_dtensor(config(), [Chunk()], state_of(run), f"{url}/sync")
        queue = AsyncCallsQueue()
        background = config(async_save=True, save=url)
        queue.schedule_async_request(
            handle := fsdp.save_fsdp_dtensor(background, [Chunk()], state_of(run), f"{url}/async")
        )
        dcp_ranks._scramble(state_of(run)["model"])
        queue.maybe_finalize_async_calls(blocking=True)
        wrong = {}
        for name in ("sync", "async"):
            scaffold = {**state_of(dcp_ranks.Trained(seed=1), seed=1), "_model": [Chunk()]}
            state, *_ = fsdp.load_fsdp_dtensor_checkpoint(
                url, background.checkpoint, False, scaffold, None, checkpoint_path_override=f"{url}/{name}"
            )
            wrong[name] = differences({"model": whole["model"]}, {"model": dcp_ranks._whole(state)["model"]})
        if rank == 1:
            patch.setattr(MultiStorageFileSystemWriter, "write_data", out_of_quota)
        queue.schedule_async_request(
            fsdp.save_fsdp_dtensor(background, [Chunk()], state_of(run), f"{url}/async")
        )
        with pytest.raises(AsyncSaveError, match=r"rank 1: .*out of quota"):
            queue.close()
    return {
        "wrong": wrong,
        "report": (handle.report.nbytes > 0, handle.result() is handle.report),
        "left": (Path(directory) / "async" / ".metadata").exists(),
    }


def out_of_quota(*_: Any) -> None:
    raise OSError("out of quota")


def test_object_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("multistorageclient")
    provider = {"type": "file", "options": {"base_path": str(tmp_path)}}
    (tmp_path / "msc.yaml").write_text(json.dumps({"profiles": {"fsdp": {"storage_provider": provider}}}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    for found in run_ranks(save_to_object_storage, 2, "msc://fsdp/run", str(tmp_path / "run")):
        assert found == {"wrong": {"sync": [], "async": []}, "report": (True, True), "left": False}


def test_object_storage_is_for_its_own_paths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("multistorageclient")
    monkeypatch.setattr(compat.MultiStorageClientFeature, "_enabled", True)
    writer = _create_fsdp_dtensor_storage_writer(str(tmp_path))
    assert (type(writer), writer.checkpoint_id) == (FastStorageWriter, str(tmp_path))


def save_what_one_rank_cannot_plan(rank: int, root: str) -> None:
    state = state_of(dcp_ranks.Trained(seed=0))
    state["iteration"] = (lambda: 0) if rank == 1 else 7  # an object that cannot be pickled
    state["only here"] = {"object": state.pop("iteration")} if rank == 1 else {}
    fsdp.save_fsdp_dtensor(config(async_save=True, save=root), [Chunk()], state, root)


def test_a_rank_that_cannot_stage_stops_all(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1:") as caught:
        run_ranks(save_what_one_rank_cannot_plan, 2, str(tmp_path / "c"))
    assert caught.value.errors == dict.fromkeys(range(2), UnsafeCheckpointError.__name__)  # type: ignore
    assert not (tmp_path / "c" / ".metadata").exists()
    assert not dist.is_initialized()
