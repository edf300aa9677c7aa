# SPDX-License-Identifier: Apache-2.0
"""FastCheckpointManager with Megatron Bridge's own objects, where Bridge is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import FastCheckpointManager
from ckpt_fast.checkpointing import CheckpointLoadContext, CheckpointSaveContext
from tests.helpers import run_ranks
from tests.interop.bridge_on_cpu import load_bridge
from tests.models import FLOPS, Run, Setup, differences, other

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None, reason="needs megatron-bridge: make test-bridge"
)


def with_bridge_state(run: Run, bridge: Any, **checkpoint: Any) -> Any:
    """Use Bridge's GlobalState and configuration in a run, which keeps its model and optimizer."""
    config = bridge.config
    state = bridge.state.GlobalState()
    state.cfg = config.ConfigContainer(
        model=run.model[0].config,
        train=config.TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=10),
        optimizer=run.state.cfg.optimizer,
        ddp=run.state.cfg.ddp,
        scheduler=config.SchedulerConfig(),
        dataset=None,
        logger=config.LoggerConfig(),
        tokenizer=config.TokenizerConfig(),
        checkpoint=config.CheckpointConfig(
            custom_manager_class="ckpt_fast.FastCheckpointManager", **checkpoint
        ),
    )
    state.train_state = run.state.train_state = bridge.state.TrainState()
    run.state = state
    return state


def through_our_manager(rank: int, root: str) -> tuple[str, list[dict[str, Any]]]:
    bridge = load_bridge()
    refusal = ""
    try:
        bridge.checkpointing.create_checkpoint_manager(
            bridge.config.CheckpointConfig(custom_manager_class="ckpt_fast.FastCheckpointManager")
        )
    except Exception as error:
        refusal = str(error)
    bridge.instantiate.register_allowed_target_prefix("ckpt_fast.")
    return refusal, [
        save_and_resume(bridge, f"{root}/sync", is_async=False),
        save_and_resume(bridge, f"{root}/async", is_async=True),
    ]


def save_and_resume(bridge: Any, root: str, *, is_async: bool) -> dict[str, Any]:
    fired: list[int] = []
    callbacks = bridge.callbacks.CallbackManager()
    callbacks.register("on_checkpoint_save", lambda context: fired.append(context.state.train_state.step))
    options = {"save": root, "load": root, "async_save": is_async, "async_strategy": "mcore"}
    setup = Setup(bf16=True, distributed=True)
    with Run(setup) as run:
        state = with_bridge_state(run, bridge, **options)
        manager = bridge.checkpointing.create_checkpoint_manager(state.cfg.checkpoint)
        assert isinstance(manager, FastCheckpointManager)
        run.train(2)
        expected = run.fingerprint()
        manager.save(CheckpointSaveContext(state, run.model, run.optimizer, run.scheduler, FLOPS), callbacks)
        run.train(1)
        manager.finalize_async_saves(state, blocking=True, terminate=True)
    with Run(other(setup)) as run:
        state = with_bridge_state(run, bridge, **options)
        run.train(1)
        manager = bridge.checkpointing.create_checkpoint_manager(state.cfg.checkpoint)
        result = manager.load(CheckpointLoadContext(state, run.model, run.optimizer, run.scheduler))
        wrong = differences(expected, run.fingerprint(), "train_state")
        step = state.train_state.step
    return {"result": result, "wrong": wrong, "fired": len(fired), "step": step}


def test_bridge_resumes_through_our_manager(tmp_path: Path) -> None:
    resumed = {"result": (2, FLOPS), "wrong": [], "fired": 1, "step": 2}
    for refusal, found in run_ranks(through_our_manager, 2, str(tmp_path), timeout_s=600):
        # FastCheckpointManager documents what to call: Bridge refuses before it imports anything of ours.
        assert "register_allowed_target_prefix" in refusal
        assert found == [resumed, resumed]
