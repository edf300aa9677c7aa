# SPDX-License-Identifier: Apache-2.0
"""Local checkpoints: each rank's own files, for recovery of the same run on the same layout."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import compat
from ckpt_fast.checkpointing import init_checkpointing_context, maybe_finalize_async_save, save_checkpoint
from ckpt_fast.doors.local.files import write_local
from ckpt_fast.trainer.contents import local as contents
from ckpt_fast.trainer.load import load as load_module
from ckpt_fast.trainer.load import restore
from tests.helpers import RankError, run_ranks
from tests.models import FLOPS, Run, Setup, differences, megatron_on_cpu, other
from tests.trainer.training import error_of, iterations, tracked

local_door = pytest.importorskip("ckpt_fast.doors.local.manager")
pytestmark = pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")


def save_and_recover(rank: int, setup: Setup, root: str, local: str, is_async: bool) -> dict[str, Any]:
    """Save step 1 persistently and step 2 locally; recover a new run from the newer one."""
    config = {
        "non_persistent_ckpt_type": "local",
        "non_persistent_local_ckpt_dir": local,
        "async_save": is_async,
        "async_strategy": "mcore",
    }
    # nvidia-resiliency-ext and its state dict synchronize with a GPU, whether there is one or not.
    go = threading.Event()
    with megatron_on_cpu(), Run(setup, save=root, **config) as run, pytest.MonkeyPatch.context() as patch:
        if is_async:
            # The disk is slow: writing begins when training has changed everything.
            patch.setattr(local_door, "write_local", lambda *args: (go.wait(30), write_local(*args)))
        context = init_checkpointing_context(run.checkpoint)
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        run.save(checkpointing_context=context)
        run.train(1)
        # The train state does not include these operations yet.
        training = (run.state, run.model, run.optimizer, run.scheduler)
        options = {"checkpointing_context": context, "non_persistent_ckpt": True}
        save_checkpoint(*training, FLOPS + 1, **options)
        expected = run.fingerprint()
        expected["train_state"]["floating_point_operations_so_far"] = float(FLOPS + 1)
        run.train(1)
        go.set()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
    with megatron_on_cpu(), Run(other(setup), save=root, load=root, **config) as run:
        run.train(1)
        result = run.load(checkpointing_context=init_checkpointing_context(run.checkpoint))
        wrong = differences(expected, run.fingerprint())
    return {"result": result, "wrong": wrong, "persistent": (iterations(root), tracked(root))}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "setup",
    [Setup(bf16=True, distributed=True), Setup(tp=2, glu=(4, 2))],
    ids=["dp2-distributed", "tp2-interleaved"],
)
def test_recovery_from_local_files(
    tmp_path: Path, setup: Setup, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USE_ACT_FUSION_FOR_DENSE", "1")
    root, local = str(tmp_path / "root"), str(tmp_path / "local")
    for found in run_ranks(save_and_recover, 2, setup, root, local, is_async):
        assert found == {"result": (2, FLOPS + 1), "wrong": [], "persistent": ([1], (1, 1))}
    found = {os.path.relpath(directory, local) for directory, _, names in os.walk(local) if names}
    assert found == {f"{rank}/iter_0000002_{rank}_local" for rank in range(2)}


def save_before_and_after_a_change(_rank: int, root: str, local: str) -> tuple[tuple[int, int], list[str]]:
    """Save local checkpoints of steps 1 and 2 as constant structure, although a parameter's type changes."""
    config = {
        "non_persistent_ckpt_type": "local",
        "non_persistent_local_ckpt_dir": local,
        "non_persistent_local_ckpt_algo": "fully_parallel",
        "ckpt_assume_constant_structure": True,
        "save_optim": False,
        "load_optim": False,
    }

    def widen(run: Run) -> None:
        for name, parameter in run.model[0].named_parameters():
            if name.endswith("final_layernorm.weight"):
                parameter.data = parameter.data.double()

    setup = Setup()
    with megatron_on_cpu(), Run(setup, save=root, **config) as run:
        context = init_checkpointing_context(run.checkpoint)
        run.train(1)
        run.save(checkpointing_context=context, non_persistent_ckpt=True)
        run.train(1)
        widen(run)
        run.save(checkpointing_context=context, non_persistent_ckpt=True)
        expected = run.fingerprint()
    with megatron_on_cpu(), Run(other(setup), save=root, load=root, **config) as run:
        widen(run)
        result = run.load(checkpointing_context=init_checkpointing_context(run.checkpoint))
        wrong = [name for name in differences(expected, run.fingerprint()) if name.startswith("model")]
    return result, wrong


def test_a_structure_that_changes_though_it_is_said_not_to(tmp_path: Path) -> None:
    for found in run_ranks(
        save_before_and_after_a_change, 2, str(tmp_path / "root"), str(tmp_path / "local")
    ):
        assert found == ((2, FLOPS), [])


def load_what_one_rank_cannot(rank: int, root: str, local: str, wrong: str) -> tuple[str, str, list[str]]:
    """Save, and let rank 1 alone ask for something else; return the error and what the load has changed."""
    config = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": local, "save": root}
    setup = Setup(bf16=True, distributed=True)
    with megatron_on_cpu(), Run(setup, **config) as run:
        run.train(1)
        context = init_checkpointing_context(run.checkpoint)
        run.save(checkpointing_context=context, non_persistent_ckpt=True)
    build = load_module.build_scaffold

    def build_another(*arguments: Any) -> dict[str, Any]:
        scaffold = build(*arguments)
        entry = scaffold["model"]["decoder.final_layernorm.weight"]
        if wrong == "a name":
            entry.key = "unheard.of"
        elif wrong == "a shape":
            scaffold["model"]["decoder.final_layernorm.weight"] = compat.ShardedTensor.from_rank_offsets(
                entry.key, torch.zeros(3), replica_id=entry.replica_id
            )
        return scaffold

    with (
        megatron_on_cpu(),
        Run(other(setup), load=root, **config) as run,
        pytest.MonkeyPatch.context() as patch,
    ):
        run.train(3)
        if rank == 1:
            patch.setattr(load_module, "build_scaffold", build_another)
        if rank == 1 and wrong == "counters":
            patch.setattr(restore, "_loaded_train_state", lambda *_: {}["step"])
        context = init_checkpointing_context(run.checkpoint)
        before = run.fingerprint()
        kind, message = error_of(lambda: run.load(checkpointing_context=context))
        return kind, message, differences(before, run.fingerprint())


@pytest.mark.parametrize("wrong", ["a name", "a shape", "counters"])
def test_what_one_rank_cannot_load_changes_nothing_on_any(tmp_path: Path, wrong: str) -> None:
    expected = {
        "a name": ("CheckpointMismatchError", "it has no unheard.of at (0,)"),
        "a shape": (
            "CheckpointMismatchError",
            "decoder.final_layernorm.weight has the shape (16,) in it, and (3,) here",
        ),
        "counters": ("KeyError", "step"),
    }[wrong]
    arguments = (str(tmp_path / "root"), str(tmp_path / "local"), wrong)
    for kind, message, changed in run_ranks(load_what_one_rank_cannot, 2, *arguments):
        assert (kind, changed) == (expected[0], []), message
        assert expected[1] in message


def load_what_lacks_a_section(rank: int, root: str, local: str, lacking: str) -> tuple[str, str, list[str]]:
    """Save a local checkpoint without optimizer or RNG state, and ask for it."""
    config = {"non_persistent_ckpt_type": "local", "non_persistent_local_ckpt_dir": local, "save": root}
    setup = Setup(bf16=True, distributed=True)
    with megatron_on_cpu(), Run(setup, **config, **{lacking: False}) as run:
        run.train(1)
        context = init_checkpointing_context(run.checkpoint)
        run.save(checkpointing_context=context, non_persistent_ckpt=True)
    with megatron_on_cpu(), Run(other(setup), load=root, **config) as run:
        run.train(3)
        context = init_checkpointing_context(run.checkpoint)
        before = run.fingerprint()
        kind, message = error_of(lambda: run.load(checkpointing_context=context))
        return kind, message, differences(before, run.fingerprint())


@pytest.mark.parametrize("lacking", ["save_optim", "save_rng"])
def test_a_section_that_is_missing_is_refused_before_anything_is_changed(
    tmp_path: Path, lacking: str
) -> None:
    arguments = (str(tmp_path / "root"), str(tmp_path / "local"), lacking)
    for kind, message, changed in run_ranks(load_what_lacks_a_section, 2, *arguments):
        assert (kind, changed) == ("CheckpointMismatchError", []), message


def lose_a_rank(rank: int, root: str, local: str, where: str) -> None:
    config = {
        "non_persistent_ckpt_type": "local",
        "non_persistent_local_ckpt_dir": local,
        "replication": True,
        "replication_jump": 1,
    }
    with megatron_on_cpu(), Run(Setup(), save=root, load=root, **config) as run:
        context = init_checkpointing_context(run.checkpoint)
        run.train(1)
        run.save(checkpointing_context=context, non_persistent_ckpt=True)
        run.train(1)
        manager = context["local_checkpoint_manager"]
        place, name = {
            "collecting": (compat.import_tensor_aware_state_dict(), "from_state_dict"),
            "replicating": (manager.repl_strategy, "replicate"),
            "waiting": (contents, "barrier_if_distributed"),
            "looking": (manager, "_my_ckpt_ids"),
            "receiving": (local_door, "exchange"),
        }[where]
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(place, name, lambda *_, **__: os._exit(9))  # as if it were killed
            if where in ("looking", "receiving"):
                manager.latest_iteration = -1
                run.load(checkpointing_context=context)
            else:
                run.save(checkpointing_context=context, non_persistent_ckpt=True)


@pytest.mark.parametrize("where", ["collecting", "replicating", "waiting", "looking", "receiving"])
def test_a_rank_that_is_gone_is_an_error_that_says_so(tmp_path: Path, where: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(lose_a_rank, 2, str(tmp_path / "run"), str(tmp_path / "local"), where, fresh=True)
    assert caught.value.errors == {0: "RankLostError", 1: "ProcessEnded"}
    assert "rank 0 has lost touch with the other 1 ranks" in str(caught.value)
