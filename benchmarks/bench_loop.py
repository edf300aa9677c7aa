# SPDX-License-Identifier: Apache-2.0
"""Measure background saves where a user waits for them: in a training loop of Megatron-Core.

    python benchmarks/bench_loop.py --rounds 5
    torchrun --nproc-per-node 2 benchmarks/bench_loop.py --layers 12 --hidden-size 512

The model is that of examples/train_gpt.py, in bf16 with a distributed optimizer; 200 thin layers by default,
for thousands of tensors and objects. Every save is the second or a later one of its contestant, which may
reuse what it has planned. A round trains some steps, saves, and trains on until the checkpoint is durable.
Times are those of the slowest rank:

held up   the call of the save
later     how much longer the steps after it take in all, up to the one that finds the checkpoint durable
durable   from the call until a step finds the checkpoint durable
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import harness
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ckpt_fast import compat, settings
from ckpt_fast.checkpointing import (
    init_checkpointing_context,
    maybe_finalize_async_save,
    save_checkpoint,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import train_gpt

HELD_UP, LATER, DURABLE = "held up", "later", "durable"
_STEPS_BEFORE = 3


class Loop:
    """A training run that can be continued step by step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.args = argparse.Namespace(
            num_layers=options.layers,
            hidden_size=options.hidden_size,
            ffn_hidden_size=2 * options.hidden_size,
            num_attention_heads=2,
            seq_length=16,
            micro_batch_size=1,
            dropout=0.0,
            bf16=True,
            use_distributed_optimizer=True,
            tensor_model_parallel_size=1,
            seed=1234,
            lr=1e-3,
            train_iters=10**6,
            text=Path(train_gpt.__file__).resolve().parent.parent / "LICENSE",
            save=str(options.path / "ours"),
            load=None,
            save_interval=1,
            async_save=True,
        )
        self.device = train_gpt.initialize(self.args)
        self.model = train_gpt.build_model(self.args, self.device)
        self.optimizer, self.scheduler = train_gpt.build_optimizer(self.args, self.model)
        self._text = train_gpt.ByteText(self.args.text, self.args.seq_length, self.args.seed)
        self.steps = 0

    def step(self) -> float:
        """Train one step; returns the seconds it took."""
        begin = time.perf_counter()
        batch = self._text.batch(self.steps, self.args.micro_batch_size)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        train_gpt.train_step(self.args, self.model, self.optimizer, self.scheduler, batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps += 1
        return time.perf_counter() - begin

    def sharded_state_dict(self) -> dict[str, Any]:
        """Build what a user of Megatron-Core passes to ``dist_checkpointing.save``."""
        metadata = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
        model = compat.unwrap_model(self.model)[0].sharded_state_dict(metadata=metadata)
        return {
            "iteration": self.steps,
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict({"model": model}, metadata=metadata),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }

    def local_tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor of this rank's model and optimizer, by a name of its own."""
        rank = dist.get_rank()
        tensors = {} if rank else {name: p.detach() for name, p in self.model[0].named_parameters()}
        for number, member in enumerate(getattr(self.optimizer, "chained_optimizers", [self.optimizer])):
            adam = member.optimizer
            for index, parameter in enumerate(p for group in adam.param_groups for p in group["params"]):
                state = {"main": parameter.detach(), **adam.state[parameter]}
                tensors.update({f"{rank}.{number}.{index}.{name}": value for name, value in state.items()})
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all ranks' tensors, as they are saved."""
        total = torch.tensor(sum(tensor.nbytes for tensor in self.local_tensors().values()))
        dist.all_reduce(total)
        return int(total)


class Saver:
    """A way to save in the background."""

    name = ""

    def available(self) -> str | None:
        """Return why it cannot take part, or None if it can."""
        return None

    def save(self, loop: Loop, path: Path) -> None:
        """Return when training may go on."""
        raise NotImplementedError

    def poll(self, blocking: bool = False) -> bool:
        """Collective. Called after every step; returns whether the checkpoint is durable."""
        raise NotImplementedError


class Fast(Saver):
    def __init__(self, name: str, reuse: bool = True) -> None:
        self.name, self._reuse = name, reuse
        self._state: Any = None

    def save(self, loop: Loop, path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._save(loop, path)

    def _save(self, loop: Loop, path: Path) -> None:
        if self._state is None:
            self._state = train_gpt.build_state(loop.args, loop.model)
            self._state.cfg.checkpoint.ckpt_assume_constant_structure = self._reuse
            self._context = init_checkpointing_context(self._state.cfg.checkpoint)
        self._state.cfg.checkpoint.save = str(path)
        self._state.train_state.step = loop.steps
        save_checkpoint(
            self._state, loop.model, loop.optimizer, loop.scheduler, 0, checkpointing_context=self._context
        )

    def poll(self, blocking: bool = False) -> bool:
        with contextlib.redirect_stdout(io.StringIO()):
            maybe_finalize_async_save(self._state, self._state.cfg.checkpoint, blocking=blocking)
        return self._state.async_calls_queue.get_num_unfinalized_calls() == 0


class MegatronCore(Saver):
    """Stock, with everything cached that it can cache."""

    def __init__(self, persistent: bool) -> None:
        self.name = f"mcore async, {'persistent' if persistent else 'temporary'} writer"
        self._persistent = persistent
        self._strategy: Any = None

    def available(self) -> str | None:
        needs_gpu = self._persistent and not torch.cuda.is_available()
        return "its writer process needs a GPU" if needs_gpu else None

    def save(self, loop: Loop, path: Path) -> None:
        is_first = self._strategy is None
        if is_first:
            self._queue = compat.MCoreAsyncCallsQueue(persistent=self._persistent)
            stock = compat.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=2, cached_metadata=True)
            group = compat.parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._strategy = compat.FullyParallelSaveStrategyWrapper(stock, group, True)
        if dist.get_rank() == 0:
            path.mkdir(parents=True)
        dist.barrier()
        request = compat.dist_checkpointing.save(
            loop.sharded_state_dict(),
            str(path),
            self._strategy,
            validate_access_integrity=is_first,
            async_sharded_save=True,
        )
        self._queue.schedule_async_request(request)

    def poll(self, blocking: bool = False) -> bool:
        self._queue.maybe_finalize_async_calls(blocking=blocking)
        return bool(self._queue.get_num_unfinalized_calls() == 0)


class Dcp(Saver):
    name = "dcp.async_save"

    def save(self, loop: Loop, path: Path) -> None:
        writer = dcp.FileSystemWriter(path, thread_count=2)
        self._saved = dcp.async_save(loop.local_tensors(), storage_writer=writer)

    def poll(self, blocking: bool = False) -> bool:
        if blocking:
            self._saved.result()
        done = torch.tensor(int(self._saved.done()))
        dist.all_reduce(done, dist.ReduceOp.MIN)
        return bool(done)


def contestant(saver: Saver, loop: Loop, path: Path) -> harness.Contestant:
    """Return a contestant that trains, saves, and trains on until the checkpoint is durable."""

    def run() -> dict[str, float]:
        usual = median(loop.step() for _ in range(_STEPS_BEFORE))
        dist.barrier()
        begin = time.perf_counter()
        saver.save(loop, path)
        held_up, later, is_durable = time.perf_counter() - begin, 0.0, False
        while not is_durable:
            seconds, before = loop.step(), time.perf_counter()
            is_durable = saver.poll()
            later += seconds + time.perf_counter() - before - usual
        return slowest({HELD_UP: held_up, LATER: max(later, 0.0), DURABLE: time.perf_counter() - begin})

    def after() -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()

    return harness.Contestant(saver.name, run, after=after)


def memcpy(loop: Loop) -> harness.Contestant:
    """Return a contestant that copies the bytes of the state into reused memory."""
    source = list(loop.local_tensors().values())
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in source]

    def run() -> dict[str, float]:
        dist.barrier()
        begin = time.perf_counter()
        with torch._C.DisableTorchFunction():
            torch._foreach_copy_(copies, source, non_blocking=True)
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        return slowest({HELD_UP: time.perf_counter() - begin})

    return harness.Contestant("limit: memcpy", run)


def slowest(seconds: dict[str, float]) -> dict[str, float]:
    """Return each figure's maximum over all ranks."""
    figures = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    return dict(zip(seconds, figures.tolist(), strict=True))


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--layers", type=int, default=200)
        parser.add_argument("--hidden-size", type=int, default=64)

    options = harness.parse_arguments(__doc__, more=add)
    report = harness.Report(options)
    if not dist.is_torchelastic_launched():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    loop = Loop(options)
    atexit.register(dist.destroy_process_group)
    shared = [options.path]
    dist.broadcast_object_list(shared)
    options.path = shared[0]
    ours = Fast("ckpt_fast")
    everyone = [
        ours,
        Fast("ckpt_fast, ckpt_assume_constant_structure=False", reuse=False),
        stock := MegatronCore(persistent=False),
        MegatronCore(persistent=True),
        Dcp(),
    ]
    reasons = {saver.name: saver.available() for saver in everyone}
    loop.step()
    copy = memcpy(loop)
    contestants = [copy]
    contestants += [
        contestant(saver, loop, options.path / "checkpoint") for saver in everyone if not reasons[saver.name]
    ]
    contestants = harness.selected(contestants, options.only)
    times = harness.measure(contestants, options.rounds)
    ranks, nbytes, tensors = dist.get_world_size(), loop.nbytes, len(loop.local_tensors())
    what = (
        f"{ranks} rank{'s' * (ranks > 1)}, {options.layers} layers of {options.hidden_size}, "
        f"{tensors} tensors on rank 0, {nbytes / 1e6:.0f} MB in all, {settings.io_threads()} threads, "
        f"{options.rounds} rounds"
    )
    for figure, title, limit in (
        (HELD_UP, "training is held up", copy.name),
        (LATER, "later steps take longer, together", None),
        (DURABLE, "from the call until durable", None),
    ):
        report.add(harness.table(f"{title}, {what}", times[figure], contestants, nbytes, stock.name, limit))
    report.add([f"not measured: {name} ({reason})" for name, reason in reasons.items() if reason])
    if dist.get_rank() == 0:
        report.finish()


if __name__ == "__main__":
    main()
