# SPDX-License-Identifier: Apache-2.0
"""Whole runs with ``ckpt_format="fsdp_dtensor"``: which checkpoint is chosen and what is restored.

The model is torch's FSDP2, which runs on a CPU, in classes with the interface of Megatron FSDP's.
"""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ckpt_fast import compat
from ckpt_fast.checkpointing import load_checkpoint, maybe_finalize_async_save, save_checkpoint
from ckpt_fast.config import CheckpointConfig, ConfigContainer
from ckpt_fast.state import GlobalState
from ckpt_fast.trainer.contents import fsdp
from ckpt_fast.trainer.load import plan as load_plan
from tests.doors.dcp.reads import edit, lose
from tests.helpers import install_cpu_rng_tracker, run_ranks, uninstall_rng_tracker
from tests.models import identical
from tests.trainer.training import error_of

pytestmark = pytest.mark.skipif(not compat.HAVE_MEGATRON_FSDP, reason="needs Megatron FSDP")


class Chunk(torch.nn.Sequential):
    """A sharded model with the one method that is called on Megatron's."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (self[0], self[2], self):
            fully_shard(layer, mesh=mesh)
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True)

    def state_dict_for_save_checkpoint(self) -> dict[str, Any]:
        return self.state_dict()


class Optimizer:
    """Adam with the methods of Megatron-Core's optimizers; ``calls`` records the relevant ones."""

    def __init__(self, model: Chunk) -> None:
        self.model, self.adam = model, torch.optim.Adam(model.parameters(), lr=0.1)
        self.calls: list[str] = []

    def sharded_state_dict(
        self, state_dict: dict[str, Any], metadata: dict[str, Any], is_loading: bool = False
    ) -> dict[str, Any]:
        self.calls.append("sharded_state_dict")
        return dcp_state_dict.get_optimizer_state_dict(self.model, self.adam)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")
        dcp_state_dict.set_optimizer_state_dict(self.model, self.adam, state_dict)

    def reload_model_params(self) -> None:
        self.calls.append("reload_model_params")


class Training:
    """One run on this rank. ``checkpoint`` are fields of CheckpointConfig."""

    def __init__(self, seed: int = 0, **checkpoint: Any) -> None:
        install_cpu_rng_tracker(seed)
        self.model = Chunk(seed)
        self.optimizer = Optimizer(self.model)
        self.state = GlobalState()
        self.state.cfg = ConfigContainer(
            model=self.model.config,
            optimizer=SimpleNamespace(use_distributed_optimizer=True),
            ddp=None,
            checkpoint=CheckpointConfig(ckpt_format="fsdp_dtensor", **checkpoint),
        )
        self.train()

    def train(self) -> None:
        step = self.state.train_state.step
        generator = torch.Generator().manual_seed(step)
        self.model(torch.randn(4, 5, generator=generator)).pow(2).sum().backward()
        self.optimizer.adam.step()
        self.optimizer.adam.zero_grad()
        self.state.train_state.step += 1

    def save(self, **options: Any) -> dict[str, Any]:
        save_checkpoint(self.state, [self.model], self.optimizer, None, 7, **options)
        return self.parts()

    def load(self) -> tuple[int, int]:
        return load_checkpoint(self.state, [self.model], self.optimizer, None)

    def everything(self) -> dict[str, Any]:
        """Local. Return copies of this rank's part of all that a load may change."""
        chunks = {name: each.detach().to_local() for name, each in self.model.named_parameters()}
        moments = [
            value.detach().to_local() if isinstance(value, DTensor) else value
            for each in self.model.parameters()
            for value in self.optimizer.adam.state[each].values()
        ]
        rng = (random.getstate(), torch.get_rng_state(), compat.get_cuda_rng_tracker().get_states())
        counters = vars(self.state.train_state)
        return copy.deepcopy({"model": chunks, "optimizer": moments, "rng": rng, "counters": counters})

    def parts(self) -> dict[str, Any]:
        """Collective. Return copies of the whole values of what a checkpoint restores."""
        options = dcp_state_dict.StateDictOptions(full_state_dict=True)
        model, adam = dcp_state_dict.get_state_dict(self.model, self.optimizer.adam, options=options)
        tracker = compat.get_cuda_rng_tracker().get_states()
        return copy.deepcopy({"model": model, "optimizer": adam, "rng": (torch.get_rng_state(), tracker)})


def save_all(rank: int, root: str) -> None:
    """Save iterations 1, 2 (in the background, without nvidia-resiliency-ext) and, for recovery, 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "HAVE_NVRX", False)
        run = Training(save=root, non_persistent_ckpt_type="global", async_strategy="mcore")
        expected = [run.save()]
        run.train()
        run.state.cfg.checkpoint.async_save = True
        run.state.initialize_async_checkpoint_worker()
        expected.append(run.save())
        run.train()
        maybe_finalize_async_save(run.state, run.state.cfg.checkpoint, blocking=True, terminate=True)
        run.state.cfg.checkpoint.async_save = False
        expected.append(run.save(non_persistent_ckpt=True))
        run.state.cfg.checkpoint.save_optim = False
        run.state.cfg.checkpoint.save = f"{root}/weights"
        expected.append(run.save())
    if rank == 0:
        torch.save(expected, f"{root}/expected.pt")
    uninstall_rng_tracker()


def resume(rank: int, root: str, source: str, step: int, changes: dict[str, Any], layout: int) -> Any:
    """Return what a load restored of iteration ``step``'s values, and what it called."""
    with pytest.MonkeyPatch.context() as patch:
        collected: list[Any] = []
        get_rng_state = load_plan.get_rng_state
        patch.setattr(
            load_plan, "get_rng_state", lambda *args, **kw: collected.append(1) or get_rng_state(*args, **kw)
        )
        validated: list[Any] = []
        patch.setattr(compat, "validate_fsdp_dtensor_model_load", lambda *_, strict: validated.append(strict))
        run = Training(seed=5, load=f"{root}/{source}", **changes)
        run.state.cfg.model.tensor_model_parallel_size = layout
        before = run.parts()
        result = run.load()
        after = run.parts()
    uninstall_rng_tracker()
    expected = torch.load(f"{root}/expected.pt", weights_only=False)[step - 1]
    return {
        "result": result,
        "restored": {name for name in expected if identical(expected[name], after[name])},
        "kept": {name for name in expected if identical(before[name], after[name])},
        "calls": run.optimizer.calls,
        "rng collected": len(collected),
        "validated": validated,
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fsdp")
    run_ranks(save_all, 2, str(root))
    return root


def resumed(checkpoints: Path, step: int, source: str = "", layout: int = 1, **changes: Any) -> Any:
    first, second = run_ranks(resume, 2, str(checkpoints), source, step, changes, layout)
    assert first == second
    return first


ALL = {"model", "optimizer", "rng"}
PASSED_ON = ["sharded_state_dict", "load_state_dict"]


def test_the_newest_is_resumed(checkpoints: Path) -> None:
    found = resumed(checkpoints, 2)
    assert (found["result"], found["restored"], found["calls"]) == ((2, 7), ALL, PASSED_ON)
    assert found["validated"] == ["assume_ok_unexpected"]


def test_an_explicit_step_wins_over_the_trackers(checkpoints: Path) -> None:
    found = resumed(checkpoints, 1, ckpt_step=1, save=str(checkpoints), non_persistent_ckpt_type="global")
    assert (found["result"], found["restored"]) == ((1, 7), ALL)


def test_a_newer_recovery_checkpoint_is_taken(checkpoints: Path) -> None:
    found = resumed(checkpoints, 3, save=str(checkpoints), non_persistent_ckpt_type="global")
    assert (found["result"], found["restored"]) == ((3, 7), ALL)


def test_rng_states_of_another_layout_are_not_even_asked_for(checkpoints: Path) -> None:
    found = resumed(checkpoints, 2, layout=2)
    assert (found["result"], found["restored"], found["kept"]) == ((2, 7), ALL - {"rng"}, {"rng"})
    assert found["rng collected"] == 0


def test_an_optimizer_that_was_not_saved_is_not_even_asked_for(checkpoints: Path) -> None:
    found = resumed(checkpoints, 4, source="weights")
    assert (found["result"], found["restored"]) == ((3, 7), {"model", "rng"})
    assert found["calls"] == ["reload_model_params"]


def test_finetuning_takes_the_weights_alone(checkpoints: Path) -> None:
    found = resumed(checkpoints, 2, finetune=True)
    assert (found["result"][0], found["restored"]) == (0, {"model"})
    assert (found["validated"], found["rng collected"], found["calls"]) == ([], 0, ["reload_model_params"])


def test_a_strict_load_needs_no_validation(checkpoints: Path) -> None:
    found = resumed(checkpoints, 2, strict_fsdp_dtensor_load=True)
    assert (found["restored"], found["validated"]) == (ALL, [])


def test_a_damaged_checkpoint_is_skipped(checkpoints: Path, tmp_path: Path) -> None:
    for name in ("iter_0000001", "iter_0000002"):
        shutil.copytree(checkpoints / name, tmp_path / name)
    for name in ("latest_train_state.pt", "expected.pt"):
        shutil.copy(checkpoints / name, tmp_path)
    data = tmp_path / "iter_0000002/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    found = resumed(tmp_path, 1)
    assert (found["result"], found["restored"]) == ((1, 7), ALL)


def load_what_one_rank_cannot(rank: int, root: str, wrong: str) -> tuple[str, str, dict[str, Any]]:
    """Let the load fail on rank 1 alone; return the error, and what the run is and was."""
    with pytest.MonkeyPatch.context() as patch:
        run = Training(seed=5, load=root, on_corrupt="raise")

        def refuse(*_: Any, **__: Any) -> None:
            if rank == 1 and wrong == "validation":
                raise RuntimeError("that will not do")

        patch.setattr(compat, "validate_fsdp_dtensor_model_load", refuse)
        if rank == 1 and wrong == "a shape":
            for each in run.optimizer.adam.state.values():
                each["step"] = torch.zeros(3)
        before = run.everything()
        kind, message = error_of(run.load)
        after = run.everything()
    uninstall_rng_tracker()
    return kind, message, {name: identical(before[name], after[name]) for name in before}


@pytest.mark.parametrize("wrong", ["a piece", "validation", "a shape"])
def test_what_one_rank_cannot_load_changes_nothing_on_any(
    checkpoints: Path, tmp_path: Path, wrong: str
) -> None:
    shutil.copytree(checkpoints / "iter_0000002", tmp_path / "iter_0000002")
    if wrong == "a piece":  # of the second rank
        edit(str(tmp_path / "iter_0000002"), lambda metadata: lose(metadata, "model.0.weight", 1))
    text = {
        "a piece": "none of (3, 5) at (4, 0)",
        "validation": "that will not do",
        "a shape": "Size mismatch",
    }[wrong]
    for kind, message, same in run_ranks(load_what_one_rank_cannot, 2, str(tmp_path), wrong):
        assert all(same.values()), same
        assert text in message, (kind, message)


def test_fused_layers_are_mapped_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the installed Megatron-Core is older than some of the handlers."""
    order: list[str] = []

    def pair(name: str) -> Any:
        def handle(model: Any, section: dict[str, Any], optimizer: Any) -> Any:
            order.append(name)
            return {**section, name: 1}, None if optimizer is None else {**optimizer, name: 1}

        return handle

    def experts(section: dict[str, Any], count: int) -> dict[str, Any]:
        order.append(f"experts {count}")
        return section

    monkeypatch.setattr(compat, "handle_fp8_extra_state_case", lambda section: order.append("fp8"))
    for name in ("swiglu", "gdn", "mla_down_proj", "mtp"):
        monkeypatch.setattr(compat, f"handle_{name}_in_state_dict", pair(name))
    monkeypatch.setattr(compat, "handle_experts_in_state_dict", experts)
    monkeypatch.setattr(
        compat, "preprocess_state_dict_for_uneven_dtensor", lambda state_dict: order.append("uneven")
    )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=4,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
    )
    model, raw = SimpleNamespace(config=config), {"model": {}, "optimizer": {}, "iteration": 1}
    found = fsdp.preprocess_fsdp_dtensor_state_dict(None, raw, model)
    assert order == ["fp8", "swiglu", "gdn", "mla_down_proj", "experts 4", "mtp", "uneven"]
    names = dict.fromkeys(("swiglu", "gdn", "mla_down_proj", "mtp"), 1)
    assert found == {"model": names, "optimizer": names, "iteration": 1}
    assert raw == {"model": {}, "optimizer": {}, "iteration": 1}
    assert "optimizer" not in fsdp.preprocess_fsdp_dtensor_state_dict(None, {"model": {}}, model)
