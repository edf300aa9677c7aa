# SPDX-License-Identifier: Apache-2.0
"""GPU tensors that are still being copied when training takes its next step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckpt_fast.checkpointing import _load_model_weights_from_checkpoint, maybe_finalize_async_save
from ckpt_fast.pipeline.save.stage import Staged
from ckpt_fast.trainer.places.paths import get_checkpoint_name
from ckpt_fast.trainer.save import staging
from ckpt_fast.trainer.save.staging import staging_policy
from tests.helpers import run_ranks
from tests.models import Run, Setup, differences, other
from tests.pipeline.memory.simulated_gpu import EagerGpu, install

SETUPS = [Setup(), Setup(bf16=True), Setup(bf16=True, distributed=True)]


def step(run: Run) -> None:
    run.train(1)


def load(run: Run) -> None:
    run.load()


def load_weights(run: Run) -> None:
    _load_model_weights_from_checkpoint(get_checkpoint_name(str(run.checkpoint.load), 1), run.model)


def change_while_copying(
    rank: int, setup: Setup, root: str, change: Callable[[Run], None], hooked: bool
) -> list[str]:
    """Return the names of values in the checkpoint that are not those at the time of the call."""
    with Run(setup, save=root, load=root, async_save=True, async_strategy="mcore") as run:
        run.state.initialize_async_checkpoint_worker()
        run.train(1)
        run.save()
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        run.train(1)
        with pytest.MonkeyPatch.context() as patch:
            install(patch, EagerGpu())
            # Nothing is small, or it would be safe in any case.
            patch.setattr("ckpt_fast.pipeline.memory.device_copy.SMALL_NBYTES", 0)
            begin = threading.Event()
            patch.setattr(Staged, "wait", lambda staged: (begin.wait(), staged.device_copies.wait()))
            if not hooked:
                patch.setattr(staging, "wait_staged", lambda: None)
                patch.setattr("ckpt_fast.trainer.load.load.wait_staged", lambda: None)
                patch.setattr("ckpt_fast.trainer.load.weights.wait_staged", lambda: None)
            run.save()
            expected = run.fingerprint()
            change(run)
            begin.set()
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
    with Run(other(setup), load=root) as loading:
        loading.load()
        return differences(expected, loading.fingerprint())


@pytest.mark.parametrize("setup", SETUPS, ids=["fp32", "bf16", "distributed"])
def test_the_next_step_waits_for_the_copies(tmp_path: Path, setup: Setup) -> None:
    check_that_it_waits(tmp_path, setup, step)


@pytest.mark.parametrize("change", [load, load_weights])
def test_a_load_waits_for_the_copies(tmp_path: Path, change: Callable[[Run], None]) -> None:
    check_that_it_waits(tmp_path, SETUPS[0], change)


def check_that_it_waits(tmp_path: Path, setup: Setup, change: Callable[[Run], None]) -> None:
    assert run_ranks(change_while_copying, 1, setup, str(tmp_path / "hooked"), change, True) == [[]]
    torn = run_ranks(change_while_copying, 1, setup, str(tmp_path / "unhooked"), change, False)[0]
    assert torn, "the simulated GPU is too fast to show that anything waited"


def test_what_no_optimizer_of_torch_changes_is_not_protected() -> None:
    class Foreign:
        optimizer = None

    weight = torch.nn.Linear(3, 3)
    policy = staging_policy([weight], Foreign())
    assert policy.is_protected is not None and not policy.is_protected(weight.weight)

    class Megatron:
        def __init__(self) -> None:
            self.optimizer = torch.optim.Adam(weight.parameters())

    member = Megatron()
    member.optimizer.step()
    for optimizer in (member, type("Chained", (), {"chained_optimizers": [member]})()):
        policy = staging_policy([weight], optimizer)
        assert policy.is_protected is not None and policy.is_protected(weight.weight)
        assert not policy.is_protected(torch.zeros(3)), "a buffer may change in the forward pass"
    both = type("Chained", (), {"chained_optimizers": [member, Foreign()]})()
    frozen = torch.nn.Linear(2, 2)
    policy = staging_policy([weight, frozen], both)
    assert policy.is_protected is not None
    assert policy.is_protected(weight.weight) and not policy.is_protected(frozen.weight)
