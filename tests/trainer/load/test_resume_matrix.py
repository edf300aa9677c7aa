# SPDX-License-Identifier: Apache-2.0
"""The resume matrix: what each way to start from a checkpoint restores, and what it leaves unchanged."""

from __future__ import annotations

import contextlib
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import Call, Caller, RerunMode, RerunState, RerunStateMachine

from ckpt_fast import compat
from ckpt_fast.checkpointing import init_checkpointing_context, save_checkpoint
from ckpt_fast.trainer.load.load import _load_checkpoint_from_path
from tests.helpers import run_ranks
from tests.interop.saved import save_with_stock
from tests.models import FLOPS, Run, Setup, differences, megatron_on_cpu, other
from tests.trainer import training
from tests.trainer.training import ALL, Loaded

SETUP = Setup(bf16=True, distributed=True, reshardable=True, layers=2)
ADAPTER = SimpleNamespace(adapter_key_filter=lambda key: isinstance(key, str) and "linear_proj" in key)


@dataclass(frozen=True)
class Case:
    """One row: how a run is started, which parts are then as saved, and which as before.

    ``restored`` is None if the layouts' fingerprints cannot be compared: the resharding tests compare whole
    tensors.
    """

    kept: set[str]
    restored: set[str] | None = None
    source: str = "run"
    ranks: int = 1
    setup: Setup = SETUP
    step: int = 2
    result: tuple[int, float] | None = (2, FLOPS)
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(kept=set(), restored=ALL),
    "tensor parallelism changed": Case(kept={"rng"}, ranks=2, setup=replace(SETUP, tp=2)),
    "pipeline parallelism changed": Case(kept={"rng"}, ranks=2, setup=replace(SETUP, pp=2)),
    "data parallelism changed": Case(kept=set(), ranks=2),
    "finetuning": Case(kept={"scheduler", "rng"}, restored={"model"}, result=None, config={"finetune": True}),
    "pretrained": Case(
        kept={"scheduler", "rng"},
        restored={"model"},
        result=None,
        config={"load": "/nowhere", "pretrained_checkpoint": "run"},
    ),
    "release": Case(kept={"scheduler", "rng"}, restored={"model"}, source="release", result=(0, FLOPS)),
    "optimizer omitted": Case(
        kept={"scheduler"}, restored={"model", "rng", "train_state"}, source="without optimizer"
    ),
    "optimizer not wanted": Case(
        kept={"scheduler"}, restored={"model", "rng", "train_state"}, config={"load_optim": False}
    ),
    "RNG omitted": Case(kept={"rng"}, restored=ALL - {"rng"}, source="without RNG"),
    "RNG not wanted": Case(kept={"rng"}, restored=ALL - {"rng"}, config={"load_rng": False}),
    "recovery": Case(
        kept=set(), restored=ALL, config={"load": None, "save": "run", "non_persistent_ckpt_type": "global"}
    ),
    "skip_load_to_model_and_opt": Case(
        kept={"model", "optimizer"},
        restored={"scheduler", "rng", "train_state"},
        options={"skip_load_to_model_and_opt": True},
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the roots of one run's checkpoints, by the names that cases use."""
    root = tmp_path_factory.mktemp("matrix")
    run_ranks(save_sources, 1, str(root))
    shutil.copytree(root / "run/iter_0000002", root / "release/release")
    (root / "release/latest_checkpointed_iteration.txt").write_text("release")
    return root


def save_sources(rank: int, root: str) -> None:
    config = {"non_persistent_ckpt_type": "global"}
    training.save_steps(rank, SETUP, os.path.join(root, "run"), 2, config)
    training.save_steps(rank, SETUP, os.path.join(root, "without optimizer"), 2, {"save_optim": False})
    training.save_steps(rank, SETUP, os.path.join(root, "without RNG"), 2, {"save_rng": False})
    with Run(SETUP, save=os.path.join(root, "run"), load=os.path.join(root, "run"), **config) as run:
        run.load()
        run.save(non_persistent_ckpt=True)


def start(rank: int, case: Case, root: str) -> Loaded:
    """Start a run as the case says; all data-parallel ranks compare with what the single rank saved."""
    named = {
        name: os.path.join(root, value) if value in ("run",) else value for name, value in case.config.items()
    }
    config = {"load": os.path.join(root, case.source), **named}
    source = "run" if case.source == "release" else case.source
    with Run(other(case.setup), **config) as run:
        run.train(3)
        before = run.fingerprint()
        result = run.load(**case.options)
        after = run.fingerprint()
    saved = training.saved_fingerprint(os.path.join(root, source), case.step, 0)
    return Loaded(
        result,
        ALL - training.parts(differences(saved, after)),
        ALL - training.parts(differences(before, after)),
    )


@pytest.mark.parametrize("name", CASES)
def test_resume(checkpoints: Path, name: str) -> None:
    case = CASES[name]
    for loaded in run_ranks(start, case.ranks, case, str(checkpoints)):
        assert loaded.kept == case.kept
        assert case.restored is None or loaded.restored == case.restored
        assert loaded.result == case.result or (case.result is None and loaded.result[0] == 0)


# --- Adapters --------------------------------------------------------------------------------------------


def tune(rank: int, root: str) -> dict[str, Any]:
    """Start from a base model, save adapters for recovery only, and recover them on top of the base."""
    base, own = os.path.join(root, "run"), os.path.join(root, "adapters")
    config = {"save": own, "pretrained_checkpoint": base, "non_persistent_ckpt_type": "global"}
    found: dict[str, Any] = {}
    with Run(other(SETUP), **config) as run:
        run.state.cfg.peft = ADAPTER
        run.load()
        found["finetune"] = run.checkpoint.finetune
        run.train(3)
        run.save(non_persistent_ckpt=True)
        tuned = run.fingerprint()
    with Run(other(SETUP), **config, ckpt_step=99) as run:
        run.state.cfg.peft = ADAPTER
        # As a training program loads the base: before the adapters, and as a new run.
        run.checkpoint.finetune = True
        _load_checkpoint_from_path(
            base, run.state, run.model, None, None, checkpointing_context={}, ignore_ckpt_step=True
        )
        saved = training.saved_fingerprint(base, 2, rank)
        found["base"] = [name for name in differences(saved, run.fingerprint()) if name.startswith("model.")]
        run.checkpoint.finetune, run.checkpoint.ckpt_step = False, None
        found["result"] = run.load()
        recovered = run.fingerprint()
        adapters = {name for name in tuned if "linear_proj" in name}
        # Nor does a damaged newest one change what an older one contains.
        run.train(1)
        run.save(non_persistent_ckpt=True)
        os.unlink(os.path.join(own, "non_persistent/iter_0000004/__0_0.distcp"))
        found["fallen back"] = run.load()
        after = run.fingerprint()
        found["adapters"] = [
            name for name in differences(tuned, after) if name in adapters or name.startswith("optimizer")
        ]
        found["the rest"] = [
            name
            for name in differences(saved, recovered)
            if name.startswith("model.") and name not in adapters
        ]
    return found


def test_resume_adapters_from_recovery_without_load(checkpoints: Path) -> None:
    """``load`` is None: only its location shows that the recovery checkpoint holds adapters."""
    (found,) = run_ranks(tune, 1, str(checkpoints))
    assert found == {
        "finetune": True,
        "base": [],
        "result": (3, FLOPS),
        "fallen back": (3, FLOPS),
        "adapters": [],
        "the rest": [],
    }


# --- Local recovery --------------------------------------------------------------------------------------


def recover_locally(rank: int, root: str, local: str) -> dict[str, Any]:
    """Resume from a local checkpoint, with ``load`` empty and a pretrained model configured."""
    config = {
        "load": os.path.join(local, "empty"),
        "pretrained_checkpoint": os.path.join(root, "run"),
        "non_persistent_ckpt_type": "local",
        "non_persistent_local_ckpt_dir": local,
    }
    found: dict[str, Any] = {}
    with megatron_on_cpu(), Run(SETUP, **config) as run:
        context = init_checkpointing_context(run.checkpoint)
        found["first start"] = run.load(checkpointing_context=context)[0], run.checkpoint.finetune
        run.train(4)
        # The number of operations is the argument's: the train state may lag behind.
        run.state.train_state.floating_point_operations_so_far = -1.0
        save_checkpoint(
            run.state,
            run.model,
            run.optimizer,
            run.scheduler,
            5,
            checkpointing_context=context,
            non_persistent_ckpt=True,
        )
        expected = run.fingerprint()
    with megatron_on_cpu(), Run(other(SETUP), **config) as run:
        context = init_checkpointing_context(run.checkpoint)
        result = run.load(checkpointing_context=context)
        found["second start"] = result, run.checkpoint.finetune
        found["wrong"] = differences(expected, run.fingerprint(), "train_state")
    return found


@pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")
def test_resume_locally_rather_than_from_the_pretrained_model(checkpoints: Path, tmp_path: Path) -> None:
    for found in run_ranks(recover_locally, 2, str(checkpoints), str(tmp_path)):
        assert found == {"first start": (0, True), "second start": ((4, 5), False), "wrong": []}


# --- Rerun state -----------------------------------------------------------------------------------------


# Some versions have three fields, others two.
CALLER = Caller(*("loss", 0, 0)[: len(Caller._fields)])


@contextlib.contextmanager
def rerun_machine() -> Iterator[RerunStateMachine]:
    """Megatron's rerun state machine, validating results as training programs let it."""
    machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS)
    before = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
    rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE = machine
    try:
        yield machine
    finally:
        rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE = before


def save_in_a_rerun(rank: int, root: str) -> None:
    """Save after a suspicious result: the step is to be rerun from this checkpoint on other hardware."""
    with rerun_machine() as machine, Run(SETUP, save=root) as run:
        run.train(2)
        machine.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
        machine.current_iteration = 2
        machine.failed_validation_call = Call(caller=CALLER, sequence=1)
        machine.initial_result = 4.5 + rank
        machine.suspicious_node = f"node{rank}"
        run.save()


def load_in_a_rerun(rank: int, root: str, setup: Setup) -> Any:
    with rerun_machine() as machine, Run(other(setup), load=root) as run:
        run.train(1)
        result = run.load()
        return result[0], machine.state.name, machine.initial_result, machine.suspicious_node


def test_resume_a_step_that_is_to_be_run_again(tmp_path: Path) -> None:
    """Each rank has its own rerun state; a different number of ranks or layout goes without."""
    root = str(tmp_path)
    run_ranks(save_in_a_rerun, 2, root)
    assert run_ranks(load_in_a_rerun, 2, root, SETUP) == [
        (2, "WILL_RERUN_FROM_CHECKPOINT", 4.5 + rank, f"node{rank}") for rank in range(2)
    ]
    nothing = (2, "NOT_RUNNING_YET", None, None)
    assert run_ranks(load_in_a_rerun, 1, root, SETUP) == [nothing]
    assert run_ranks(load_in_a_rerun, 2, root, replace(SETUP, tp=2)) == [nothing] * 2


# --- Older checkpoints -----------------------------------------------------------------------------------


GATHERED = {"distrib_optim_sharding_type": "dp_zero_gather_scatter"}


def save_legacy(run: Run, root: str, content: dict[str, Any] | None, arguments: dict[str, Any]) -> None:
    """Save as Megatron-LM does: arguments and counters in the state dict, and only its own tracker."""
    run.state.train_state.step = 7
    state_dict_of = run.sharded_state_dict
    facts = {"args": Namespace(**arguments), "num_floating_point_operations_so_far": 5}
    run.sharded_state_dict = lambda: {**state_dict_of(), **facts}  # type: ignore[method-assign]
    if content is not None:
        run.content_metadata = lambda: content  # type: ignore[method-assign]
    save_with_stock(run, root, None)
    directory = os.path.join(root, "iter_0000007")
    for name in ("run_config.yaml", "train_state.pt"):
        os.unlink(os.path.join(directory, name))
    if content == GATHERED and os.path.exists(os.path.join(directory, "common.pt")):
        # As it was once stored: with content metadata, but without a sharding type in it.
        common = torch.load(os.path.join(directory, "common.pt"), weights_only=False)
        del common["content_metadata"]["distrib_optim_sharding_type"]
        torch.save(common, os.path.join(directory, "common.pt"))
    os.unlink(os.path.join(root, "latest_train_state.pt"))


def load_legacy(
    rank: int, setup: Setup, root: str, content: dict[str, Any] | None, arguments: dict[str, Any]
) -> Any:
    with Run(setup) as run:
        run.train(2)
        save_legacy(run, root, content, arguments)
        expected = run.fingerprint()
    with Run(other(setup), load=root) as run:
        run.train(1)
        result = run.load()
        return (
            result,
            run.state.train_state.consumed_train_samples,
            differences(expected, run.fingerprint(), "train_state"),
        )


ARGUMENTS = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "consumed_train_samples": 4}


@pytest.mark.parametrize(
    "setup, content, arguments, wrong",
    [
        pytest.param(SETUP, None, ARGUMENTS, set(), id="Megatron-LM"),
        pytest.param(Setup(layers=2), {}, ARGUMENTS, set(), id="without content metadata"),
        pytest.param(
            replace(SETUP, reshardable=False),
            GATHERED,
            ARGUMENTS,
            set(),
            id="gathered optimizer",
        ),
        pytest.param(
            SETUP, None, {**ARGUMENTS, "no_save_optim": True}, {"optimizer", "scheduler"}, id="no_save_optim"
        ),
        pytest.param(SETUP, None, {**ARGUMENTS, "no_save_rng": True}, {"rng"}, id="no_save_rng"),
    ],
)
def test_resume_what_stock_megatron_core_saved_for_megatron_lm(
    tmp_path: Path, setup: Setup, content: Any, arguments: dict[str, Any], wrong: set[str]
) -> None:
    ((result, consumed, different),) = run_ranks(load_legacy, 1, setup, str(tmp_path), content, arguments)
    assert (result, consumed) == ((7, 5), 4)
    assert training.parts(different) == wrong


def save_without_sharding_type(rank: int, root: str) -> None:
    with Run(replace(SETUP, reshardable=False)) as run:
        run.train(1)
        save_legacy(run, root, GATHERED, ARGUMENTS)


def load_into_another_layout(rank: int, root: str) -> tuple[str, str]:
    with Run(replace(SETUP, tp=2), load=root) as run:
        return training.error_of(run.load)


def test_resume_into_another_layout_without_a_sharding_type(tmp_path: Path) -> None:
    run_ranks(save_without_sharding_type, 1, str(tmp_path))
    for error in run_ranks(load_into_another_layout, 2, str(tmp_path)):
        training.require(
            error, "RuntimeError", "(2, 1) vs (1, 1)", "dp_zero_gather_scatter", "load_optim=False"
        )
