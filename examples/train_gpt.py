# SPDX-License-Identifier: Apache-2.0
"""Train a megatron-core GPT on bytes of text; save, get killed at any moment, resume bit-identically.

    torchrun --nproc-per-node 2 examples/train_gpt.py --save ckpt --load ckpt --save-interval 6

Everything here is ordinary megatron-core, with or without a GPU. The checkpoint code is in ``build_state``
and ``train``: a ``GlobalState`` that holds settings and progress, one ``load_checkpoint`` before the loop and
one ``save_checkpoint`` inside it. Three things make a resumed run repeat the interrupted one bit for bit:

- the position in the data is a pure function of ``train_state.consumed_train_samples`` (``ByteText``);
- weights, optimizer, scheduler and RNG states are in the checkpoint, so dropout continues too;
- whatever happened after the last completed save is simply repeated.

Rank 0 appends one JSON object per line to ``--log-file``: ``{"start"}`` with the step a run starts from,
``{"step", "loss", "grad_norm"}`` with the floats as ``float.hex()``, and for each save that has become
durable ``{"saved", "stall_s", "seconds", "nbytes", "files"}``, bytes and files summed over the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_megatron
import numpy
import torch
import torch.distributed
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from ckpt_fast import SaveReport, last_report
from ckpt_fast.checkpointing import (
    init_checkpointing_context,
    load_checkpoint,
    maybe_finalize_async_save,
    save_checkpoint,
)
from ckpt_fast.config import CheckpointConfig, ConfigContainer, RNGConfig
from ckpt_fast.state import GlobalState

BYTES = 256  # the vocabulary: every byte is a token


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    run = parser.add_argument_group("run")
    run.add_argument("--train-iters", type=int, default=24)
    run.add_argument("--micro-batch-size", type=int, default=4, help="samples per rank and step")
    run.add_argument("--lr", type=float, default=1e-3)
    run.add_argument("--seed", type=int, default=1234)
    run.add_argument("--text", type=Path, default=Path(__file__).resolve().parent.parent / "LICENSE")
    run.add_argument("--log-file", type=Path, help="JSON lines are appended here")

    model = parser.add_argument_group("model")
    model.add_argument("--num-layers", type=int, default=4)
    model.add_argument("--hidden-size", type=int, default=256)
    model.add_argument("--ffn-hidden-size", type=int, default=1024)
    model.add_argument("--num-attention-heads", type=int, default=8)
    model.add_argument("--seq-length", type=int, default=128)
    model.add_argument("--dropout", type=float, default=0.1)
    model.add_argument("--bf16", action="store_true", help="bf16 parameters with fp32 master weights")

    parallel = parser.add_argument_group("parallelism")
    parallel.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parallel.add_argument("--use-distributed-optimizer", action="store_true")

    checkpoint = parser.add_argument_group("checkpoint")
    checkpoint.add_argument("--save", help="directory to save into")
    checkpoint.add_argument("--save-interval", type=int, default=6, help="steps between saves")
    checkpoint.add_argument("--async-save", action="store_true", help="write while training goes on")
    checkpoint.add_argument("--load", help="directory to resume from; may be empty or missing")
    return parser.parse_args()


class ByteText:
    """An endless, numbered sequence of windows of ``seq_length + 1`` bytes of a text.

    Window ``n`` starts at a position drawn from ``(seed, n)``: there is no state, so the number of consumed
    samples fully determines a run's data position.
    """

    def __init__(self, path: Path, seq_length: int, seed: int) -> None:
        self._bytes = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
        self._length = seq_length + 1
        self._seed = seed

    def window(self, number: int) -> torch.Tensor:
        """Return window ``number``: int64 [seq_length + 1]."""
        start = random.Random(f"{self._seed}:{number}").randrange(len(self._bytes) - self._length)
        return self._bytes[start : start + self._length]

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """Return ``count`` windows from ``first`` on as tokens and labels, [count, seq_length]."""
        windows = torch.stack([self.window(number) for number in range(first, first + count)])
        return {"tokens": windows[:, :-1].contiguous(), "labels": windows[:, 1:].contiguous()}


def initialize(args: argparse.Namespace) -> torch.device:
    """Join the process group, set up the parallel groups, seed the generators; return the rank's device."""
    cpu_megatron.install()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tensor_model_parallel_size)
    random.seed(args.seed)
    numpy.random.seed(args.seed)
    torch.manual_seed(args.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def build_model(args: argparse.Namespace, device: torch.device) -> list[DistributedDataParallel]:
    """Build a GPT with gated SwiGLU, wrapped for data parallelism; a list of one model chunk."""
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=args.dropout,
        attention_dropout=args.dropout,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        use_cpu_initialization=device.type == "cpu",
        # The fused kernels of these three exist for CUDA only.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=BYTES,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
    ).to(device)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=args.use_distributed_optimizer, grad_reduce_in_fp32=True
    )
    return [DistributedDataParallel(config, ddp_config, Float16Module(config, gpt) if args.bf16 else gpt)]


def optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.lr / 10,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )


def build_optimizer(
    args: argparse.Namespace, model: list[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build megatron-core's Adam, with linear warm-up and cosine decay counted in samples."""
    config = optimizer_config(args)
    optimizer = get_megatron_optimizer(config, model)
    samples = args.train_iters * global_batch_size(args)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=samples // 10,
        lr_decay_steps=samples,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=samples,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def global_batch_size(args: argparse.Namespace) -> int:
    """Return the number of samples that all ranks together consume in one step."""
    return args.micro_batch_size * parallel_state.get_data_parallel_world_size()


def forward_step(
    batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """Run one micro-batch through the model; the second result turns its output into the loss."""
    batch = next(batches)
    position_ids = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device)
    losses = model(batch["tokens"], position_ids.expand_as(batch["tokens"]), None, labels=batch["labels"])

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach()}

    return losses, mean_loss


def train_step(
    args: argparse.Namespace,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    batch: dict[str, torch.Tensor],
) -> tuple[float, float]:
    """Run forward, backward, all-reduce and update; return (data-parallel mean loss, gradient norm)."""
    model[0].zero_grad_buffer()
    optimizer.zero_grad()
    (losses,) = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([batch]),
        model=model,
        num_microbatches=1,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=global_batch_size(args))
    loss = losses["loss"]
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return loss.item() / parallel_state.get_data_parallel_world_size(), float(grad_norm)


class RunLog:
    """Prints lines and, if a path is given, appends JSON objects to a file; rank 0 only, unbuffered."""

    def __init__(self, path: Path | None) -> None:
        self._rank0 = torch.distributed.get_rank() == 0
        self._file = path.open("a") if path and self._rank0 else None

    def write(self, line: str, **record: Any) -> None:
        if self._rank0:
            print(line, flush=True)
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


class SaveLog:
    """Writes one record for each save that has become durable. All ranks poll at the same points."""

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self._seen: SaveReport | None = None

    def poll(self) -> None:
        """Write the newest save's record, once. A background save becomes durable some steps later."""
        report = last_report()
        if report is None or report is self._seen:
            return
        self._seen = report
        totals = torch.tensor([report.nbytes, report.files])
        torch.distributed.all_reduce(totals)
        nbytes, files = totals.tolist()
        step = int(Path(report.directory).name.removeprefix("iter_"))
        self._log.write(
            f"saved step {step}: {nbytes / 1e6:.1f} MB in {files} files, waited {report.stall_s:.3f} s",
            saved=step,
            stall_s=report.stall_s,
            seconds=report.seconds,
            nbytes=nbytes,
            files=files,
        )


def build_state(args: argparse.Namespace, model: list[DistributedDataParallel]) -> GlobalState:
    """Return what ``save_checkpoint`` and ``load_checkpoint`` need: settings and the run's progress."""
    state = GlobalState()
    state.cfg = ConfigContainer(
        model=model[0].config,
        optimizer=optimizer_config(args),
        ddp=model[0].ddp_config,
        rng=RNGConfig(seed=args.seed),
        checkpoint=CheckpointConfig(
            save=args.save,
            load=args.load,
            save_interval=args.save_interval,
            async_save=args.async_save,
            async_strategy="mcore",
            ckpt_assume_constant_structure=True,  # plan the first save, reuse its plan for the others
        ),
    )
    state.initialize_async_checkpoint_worker()
    return state


def train(args: argparse.Namespace, device: torch.device, log: RunLog) -> None:
    """Build, resume if there is a checkpoint, and train to the last step."""
    model = build_model(args, device)
    optimizer, scheduler = build_optimizer(args, model)
    state = build_state(args, model)
    context = init_checkpointing_context(state.cfg.checkpoint)
    text = ByteText(args.text, args.seq_length, args.seed)
    saves = SaveLog(log)
    if args.load:
        load_checkpoint(state, model, optimizer, scheduler, checkpointing_context=context)
    position = state.train_state
    log.write(f"starting at step {position.step}", start=position.step)

    while position.step < args.train_iters:
        first = position.consumed_train_samples
        first += parallel_state.get_data_parallel_rank() * args.micro_batch_size
        batch = {name: t.to(device) for name, t in text.batch(first, args.micro_batch_size).items()}
        loss, grad_norm = train_step(args, model, optimizer, scheduler, batch)
        position.step += 1
        position.consumed_train_samples += global_batch_size(args)
        log.write(
            f"step {position.step:4d}  loss {loss:.6f}  grad norm {grad_norm:.3f}",
            step=position.step,
            loss=loss.hex(),
            grad_norm=grad_norm.hex(),
        )
        maybe_finalize_async_save(state, state.cfg.checkpoint)
        if args.save and position.step % args.save_interval == 0:
            save_checkpoint(
                state,
                model,
                optimizer,
                scheduler,
                num_floating_point_operations_so_far=0,
                checkpointing_context=context,
            )
        saves.poll()
    maybe_finalize_async_save(state, state.cfg.checkpoint, blocking=True, terminate=True)
    saves.poll()


def main() -> None:
    args = parse_args()
    device = initialize(args)
    train(args, device, RunLog(args.log_file))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
