# SPDX-License-Identifier: Apache-2.0
"""A small megatron-core GPT with Adam, which the examples train, save and load."""

from __future__ import annotations

import os
from typing import Any

import cpu_megatron
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

VOCABULARY, SEQUENCE, BATCH = 64, 16, 2


class Training:
    """Model and optimizer of this rank, and the current step."""

    def __init__(self) -> None:
        cpu_megatron.install()
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
        parallel_state.initialize_model_parallel()
        torch.manual_seed(0)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            hidden_dropout=0.0,  # with dropout, the RNG state would have to be saved as well
            attention_dropout=0.0,
            use_cpu_initialization=not cuda,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            finalize_model_grads_func=finalize_model_grads,
        )
        gpt = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE)
        ddp = DistributedDataParallelConfig()
        self.model = [DistributedDataParallel(config, ddp, gpt.cuda() if cuda else gpt)]
        settings = OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0)
        self.optimizer = get_megatron_optimizer(settings, self.model)
        self.step = 0

    def train_step(self) -> float:
        """Take one step on data derived from its number; return the loss."""
        self.step += 1
        data_rank = parallel_state.get_data_parallel_rank()
        generator = torch.Generator().manual_seed(1000 * self.step + data_rank)
        text = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
        text = text.cuda() if torch.cuda.is_available() else text
        self.model[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([(text[:, :-1].contiguous(), text[:, 1:].contiguous())]),
            model=self.model,
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        self.optimizer.step()
        return float(losses[0]["loss"])

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Return what Megatron-Core's dist_checkpointing saves, or fills when loading."""
        model = self.model[0].module.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a loaded state dict."""
        self.model[0].module.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def _forward_step(batches: Any, model: Any) -> Any:
    tokens, labels = next(batches)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach()}

    return model(tokens, positions, None, labels=labels), mean
