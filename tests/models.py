# SPDX-License-Identifier: Apache-2.0
"""Small, real training runs: a megatron-core GPT with its optimizer, scheduler and this package's state.

A ``Run`` lives in a rank of ``helpers.run_ranks``. Everything in it is megatron-core's own: gated SwiGLU
layers, DistributedDataParallel, Adam (distributed or not), the learning-rate scheduler. CUDA calls are
replaced (``examples/cpu_megatron.py``) while a run is built, trained or saved by stock code, and restored at
the end of ``megatron_on_cpu``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils

from ckpt_fast import compat
from ckpt_fast.checkpointing import load_checkpoint, save_checkpoint
from ckpt_fast.config import CheckpointConfig, ConfigContainer, RNGConfig
from ckpt_fast.state import GlobalState
from ckpt_fast.trainer.contents.rng import get_rng_state
from ckpt_fast.trainer.contents.state_dict import _build_sharded_state_dict_metadata, generate_state_dict
from tests.glu import models as glu_models

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Without Transformer Engine, the router of version 0.16 uses a name that it never defined.
vars(moe_utils).setdefault("te_general_gemm", None)

# Megatron-Core collects garbage at every save and load of a distributed optimizer; skip imported objects.
gc.freeze()

VOCABULARY = 32
SEQUENCE = 8
BATCH = 2  # samples per data-parallel rank and step
FLOPS = 123_456_789_012_345


@dataclass(frozen=True)
class Setup:
    """What distinguishes one run from another."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    experts: int = 0  # in the whole model, besides a shared one; 0: dense layers
    distributed: bool = False  # a distributed optimizer
    reshardable: bool = False  # a fully reshardable state of it
    bf16: bool = False
    parallel_save: bool = True
    hidden: int = 16
    layers: int = 1
    seed: int = 1234
    glu: tuple[int | None, int | None] = (None, None)  # interleave sizes: routed; dense or shared

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Provide what megatron-core needs of CUDA on the CPU, in this block only."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    import cpu_megatron

    names = ("synchronize", "current_device", "current_stream")
    originals = {name: getattr(torch.cuda, name) for name in names}
    tracker_class = megatron_random.CudaRNGStatesTracker
    streams = megatron_random._CUDA_RNG_STATE_TRACKER
    outside = len(torch.overrides._get_current_function_mode_stack())
    cpu_megatron.install()
    if streams is not None and streams.get_states():
        megatron_random._CUDA_RNG_STATE_TRACKER = streams  # installing created a new one
    entered = torch.overrides._get_current_function_mode_stack()[outside:]
    try:
        yield
    finally:
        for mode in reversed(entered):
            mode.__exit__(None, None, None)
        for name, original in originals.items():
            setattr(torch.cuda, name, original)
        megatron_random.CudaRNGStatesTracker = tracker_class


class Run:
    """A model in training on this rank. Enter it in an initialized process group; leaving undoes the groups.

    Attributes:
        setup: how it was built.
        model: a list with one wrapped chunk.
        optimizer, scheduler: megatron-core's.
        state: GlobalState with a ConfigContainer in it.
    """

    def __init__(self, setup: Setup, **checkpoint: Any) -> None:
        """``checkpoint`` are fields of CheckpointConfig."""
        self.setup = setup
        self._checkpoint = checkpoint

    def __enter__(self) -> Run:
        # Fills what torch.empty returns: padding in optimizer buckets is part of a checkpoint too.
        torch.use_deterministic_algorithms(True)
        with megatron_on_cpu():
            parallel_state.initialize_model_parallel(
                self.setup.tp, self.setup.pp, expert_model_parallel_size=self.setup.ep
            )
            megatron_random.initialize_rng_tracker(force_reset=True)
            seed_everything(self.setup.seed)
            self.model = _build_model(self.setup)
            config = _optimizer_config(self.setup)
            self.optimizer = get_megatron_optimizer(config, self.model)
        self.scheduler = _build_scheduler(self.optimizer, config)
        self.state = GlobalState()
        self.state.cfg = ConfigContainer(
            model=self.model[0].config,
            optimizer=config,
            ddp=self.model[0].ddp_config,
            rng=RNGConfig(seed=self.setup.seed),
            checkpoint=CheckpointConfig(
                **{
                    "fully_parallel_save": self.setup.parallel_save,
                    "dist_ckpt_optim_fully_reshardable": self.setup.reshardable,
                    **self._checkpoint,
                }
            ),
        )
        return self

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)
        parallel_state.destroy_model_parallel()
        megatron_random.initialize_rng_tracker(force_reset=True)

    @property
    def checkpoint(self) -> CheckpointConfig:
        """Return the run's CheckpointConfig."""
        return self.state.cfg.checkpoint  # type: ignore[no-any-return]

    def train(self, steps: int = 1) -> list[float]:
        """Train with data that depends on the step and the data-parallel rank; return the losses."""
        step = glu_models.step_blindly if self.setup.experts and self.setup.tp > 1 else Run._step
        with megatron_on_cpu():
            return [step(self) for _ in range(steps)]

    def _step(self) -> float:
        position = self.state.train_state
        data_rank = parallel_state.get_data_parallel_rank()
        generator = torch.Generator().manual_seed(1000 * position.step + data_rank)
        text = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
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
        samples = BATCH * parallel_state.get_data_parallel_world_size()
        self.scheduler.step(increment=samples)
        position.step += 1
        position.consumed_train_samples += samples
        # Only the last stage of a pipeline has a loss.
        return float(losses[0]["loss"]) if losses else 0.0

    def save(self, **options: Any) -> None:
        """Call ``save_checkpoint`` for this run; options are its keyword arguments."""
        self.state.train_state.floating_point_operations_so_far = float(FLOPS)
        with self._whatever_megatron_needs():
            save_checkpoint(self.state, self.model, self.optimizer, self.scheduler, FLOPS, **options)

    def load(self, **options: Any) -> tuple[int, int]:
        """Call ``load_checkpoint`` into this run; options are its keyword arguments."""
        with self._whatever_megatron_needs():
            return load_checkpoint(self.state, self.model, self.optimizer, self.scheduler, **options)

    def _whatever_megatron_needs(self) -> contextlib.AbstractContextManager[None]:
        """Emulate CUDA if needed: a fully reshardable distributed optimizer gathers its state on the GPU."""
        gathers = self.setup.distributed and self.setup.reshardable
        return megatron_on_cpu() if gathers else contextlib.nullcontext()

    def content_metadata(self) -> dict[str, Any]:
        """Return the ``content_metadata`` of a checkpoint of this run."""
        return _build_sharded_state_dict_metadata(self.setup.distributed, self.checkpoint)

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Return what a trainer passes to ``dist_checkpointing.save`` or, with ``is_loading``, ``load``."""
        groups = compat.get_pg_collection(self.model)
        metadata = {**self.content_metadata(), "dp_cp_group": groups.dp_cp}
        optimizer: dict[str, Any] = {"metadata": metadata}
        if is_loading:
            optimizer["is_loading"] = True
            compat.give_adam_its_state(self.optimizer)
        return generate_state_dict(
            self.checkpoint,
            compat.unwrap_model(self.model),
            self.optimizer,
            self.scheduler,
            get_rng_state(False, pg_collection=groups),
            iteration=None if is_loading else self.state.train_state.step,
            optim_sd_kwargs=optimizer,
            model_sd_kwargs={"metadata": metadata},
            pg_collection=groups,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return copies of everything that a resumed run must restore, by name."""
        chunk = compat.unwrap_model(self.model)[0]
        parts: dict[str, Any] = {
            f"model.{name}": parameter.detach().clone() for name, parameter in chunk.named_parameters()
        }
        for number, member in enumerate(getattr(self.optimizer, "chained_optimizers", [self.optimizer])):
            parts.update(_optimizer_parts(f"optimizer{number}", member.optimizer))
        parts["scheduler"] = self.scheduler.state_dict()
        parts["random"] = random.getstate()
        parts["numpy"] = np.random.get_state()
        parts["torch"] = torch.get_rng_state()
        for name, stream in tensor_parallel.get_cuda_rng_tracker().get_states().items():
            parts[f"tracker.{name}"] = stream.clone()
        parts["train_state"] = copy.deepcopy(vars(self.state.train_state))
        return parts


def _optimizer_parts(prefix: str, adam: torch.optim.Optimizer) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for number, group in enumerate(adam.param_groups):
        # The scheduler sets these whenever it is loaded or stepped.
        parts[f"scheduler.{prefix}.{number}"] = (group["lr"], group["weight_decay"])
        for index, parameter in enumerate(group["params"]):
            parts[f"{prefix}.{number}.{index}.main"] = parameter.detach().clone()
            for name, value in adam.state[parameter].items():
                parts[f"{prefix}.{number}.{index}.{name}"] = torch.as_tensor(value).clone()
    return parts


def differences(expected: dict[str, Any], found: dict[str, Any], *ignored: str) -> list[str]:
    """Return the names on which two fingerprints disagree, except those with a prefix in ``ignored``."""
    names = expected.keys() | found.keys()
    return sorted(
        name
        for name in names
        if not name.startswith(ignored)
        and not (name in expected and name in found and identical(expected[name], found[name]))
    )


def identical(one: Any, other: Any) -> bool:
    """Return whether two nested values are bitwise identical in every tensor and array, dtypes included."""
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(_bytes_of(one), _bytes_of(other))
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(identical(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(identical, one, other))
    return type(one) is type(other) and bool(one == other)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def other(setup: Setup, **changes: Any) -> Setup:
    """Return a run that differs from ``setup`` in every value, and in ``changes``."""
    return replace(setup, seed=setup.seed + 1, **changes)


def seed_everything(seed: int) -> None:
    """Seed every generator that a checkpoint stores."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _build_model(setup: Setup) -> list[DistributedDataParallel]:
    # Some versions use names of Transformer Engine that they did not find and never defined.
    vars(moe_utils).setdefault("te_general_gemm", None)
    config = TransformerConfig(
        num_layers=setup.layers,
        hidden_size=setup.hidden,
        ffn_hidden_size=2 * setup.hidden,
        num_attention_heads=4,
        tensor_model_parallel_size=setup.tp,
        pipeline_model_parallel_size=setup.pp,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        num_moe_experts=setup.experts or None,
        bf16=setup.bf16,
        params_dtype=setup.dtype,
        pipeline_dtype=setup.dtype,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
        **(glu_models.mixture(setup.ep) if setup.experts else {}),
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=setup.experts or None, moe_grouped_gemm=False),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if setup.glu != (None, None):
        glu_models.interleave(gpt, setup.glu)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=setup.distributed, grad_reduce_in_fp32=True)
    return [DistributedDataParallel(config, ddp, Float16Module(config, gpt) if setup.bf16 else gpt)]


def _optimizer_config(setup: Setup) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=1e-3,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=setup.bf16,
        params_dtype=setup.dtype,
        use_distributed_optimizer=setup.distributed,
    )


def _build_scheduler(optimizer: Any, config: OptimizerConfig) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=2,
        lr_decay_steps=1000,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1000,
        wd_incr_style="constant",
    )


def _forward_step(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], model: torch.nn.Module) -> Any:
    tokens, labels = next(batches)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach()}

    return model(tokens, positions, None, labels=labels), mean_loss
