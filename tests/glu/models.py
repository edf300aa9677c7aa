# SPDX-License-Identifier: Apache-2.0
"""Models with fc1 rows interleaved in memory, built from megatron-core's own layers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils

from ckpt_fast import compat
from ckpt_fast.glu.layout import _size_for
from ckpt_fast.glu.model import _deinterleave_glu_tensor, _interleave_glu_tensor


def mixture(parallel_size: int) -> dict[str, Any]:
    """Return TransformerConfig fields for a small mixture of experts that runs on a CPU."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # missing from 0.16 if Transformer Engine is installed
    return {
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_token_dispatcher_type": "allgather",
        "moe_shared_expert_intermediate_size": 16,
        "moe_ffn_hidden_size": 16,
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": parallel_size,
    }


def step_blindly(run: Any) -> float:
    """Step with made-up gradients: mixtures train on several tensor-parallel ranks only with GPU layers."""
    position = run.state.train_state
    generator = torch.Generator().manual_seed(position.step)
    for parameter in run.model[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    run.optimizer.step()
    run.scheduler.step(increment=1)
    position.step += 1
    return 0.0


def interleave(model: torch.nn.Module, sizes: tuple[int | None, int | None]) -> None:
    """Interleave the model's fc1 rows, and adapt their outputs so that it computes the same as before.

    GPU activations accept interleaved rows; here the output is reordered before the activation.
    """
    config: Any = model.config
    config.moe_mlp_glu_interleave_size, config.moe_shared_expert_glu_interleave_size = sizes
    for name, module in model.named_modules():
        size = _size_for(f"{name}.weight", sizes)
        if size is None:
            continue
        with torch.no_grad():
            module.weight.copy_(_interleave_glu_tensor(module.weight, size))  # type: ignore[arg-type]
        module.register_forward_hook(functools.partial(_contiguous_output, size))


def _contiguous_output(size: int, _: Any, __: Any, output: Any) -> Any:
    rows, bias = output
    return rows.unflatten(-1, (-1, 2, size)).transpose(-3, -2).flatten(-3), bias


def contiguous_parameters(model: list[Any], sizes: tuple[int | None, int | None]) -> dict[str, torch.Tensor]:
    """Return the parameters as a model without interleaving has them, by name in ``Run.fingerprint``."""
    parameters: dict[str, torch.Tensor] = {}
    for name, parameter in compat.unwrap_model(model)[0].named_parameters():
        size = _size_for(name, sizes)
        value = parameter.detach()
        parameters[f"model.{name}"] = value.clone() if size is None else _deinterleave_glu_tensor(value, size)
    return parameters
