# SPDX-License-Identifier: Apache-2.0
"""How Megatron-LM's stored arguments are interpreted."""

from __future__ import annotations

from argparse import Namespace

import pytest

from ckpt_fast.trainer.contents.megatron_lm import (
    _extract_megatron_lm_args_from_state_dict,
    _get_train_state_from_state_dict,
)


def test_arguments_become_a_run_config() -> None:
    args = Namespace(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        no_save_optim=True,
        no_save_rng=False,
        ckpt_fully_parallel_save=True,
        hidden_size=64,
    )
    assert _extract_megatron_lm_args_from_state_dict({"args": args}) == {
        "model": {
            "tensor_model_parallel_size": 4,
            "pipeline_model_parallel_size": 2,
            "encoder_tensor_model_parallel_size": 0,
            "encoder_pipeline_model_parallel_size": 0,
        },
        "checkpoint": {"save_optim": False, "save_rng": True, "fully_parallel_save": True},
    }


def test_absent_arguments_have_megatron_lms_defaults() -> None:
    config = _extract_megatron_lm_args_from_state_dict({"args": Namespace()})
    assert config["model"]["tensor_model_parallel_size"] == 1
    assert config["checkpoint"] == {"save_optim": True, "save_rng": True, "fully_parallel_save": False}


def test_no_arguments_at_all() -> None:
    with pytest.raises(RuntimeError, match="missing 'args' field"):
        _extract_megatron_lm_args_from_state_dict({"model": {}})


def test_train_state() -> None:
    args = Namespace(consumed_train_samples=640, skipped_train_samples=3, consumed_valid_samples=32)
    state = _get_train_state_from_state_dict(
        {"iteration": 10, "args": args, "num_floating_point_operations_so_far": 1.5e20}
    )
    assert (state.step, state.consumed_train_samples, state.skipped_train_samples) == (10, 640, 3)
    assert (state.consumed_valid_samples, state.floating_point_operations_so_far) == (32, 1.5e20)
    assert not (state.do_train or state.do_valid or state.do_test)


@pytest.mark.parametrize("state_dict", [{}, {"args": None}, {"args": Namespace()}])
def test_train_state_of_a_bare_checkpoint_is_zero(state_dict: dict[str, object]) -> None:
    state = _get_train_state_from_state_dict(state_dict)
    assert (state.step, state.consumed_train_samples, state.floating_point_operations_so_far) == (0, 0, 0)
