# SPDX-License-Identifier: Apache-2.0
"""Measure GLU row reordering: alone, against torch and a plain copy, and inside saves and loads.

    python benchmarks/bench_glu.py --rounds 5 --path DIR

Alone: one rank's fc1 weights of an 8B model, of a 70B model on 8 tensor-parallel ranks, and of 64 experts.
The limit is a parallel copy of the same bytes into memory of the same kind: fresh for functions that return a
tensor, reused for those that fill one.

In a save and a load: an fc1 with its master weight and moments. The limit is the same without interleaving;
that load includes Megatron-Core's merging of the two halves. ``--gigabytes`` scales the width of the rows.
"""

from __future__ import annotations

import contextlib
import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import rivals
import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from ckpt_fast import compat, native, settings
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.glu.factory import interleaved
from ckpt_fast.glu.model import (
    _deinterleave_glu_tensor,
    _interleave_glu_tensor,
    _process_state_dict_for_glu_interleaving,
)
from ckpt_fast.glu.rows import contiguous_view
from ckpt_fast.pipeline.memory import strided

SIZES = (1, 8, 32, 128)
# Weights of one rank: how many, rows of each, row width.
WEIGHTS = {
    "8B, dense": (1, 28672, 4096),
    "70B, dense, 1 of 8 tensor-parallel ranks": (1, 7168, 8192),
    "a layer of 64 experts": (64, 2816, 2048),
}
ROWS, WIDTH = 14336, 4096
STATES = {
    "weight": torch.bfloat16,
    "master": torch.float32,
    "exp_avg": torch.float32,
    "exp_avg_sq": torch.float32,
}
Tensors = list[torch.Tensor]


def parallel_copy(outputs: Tensors, weights: Tensors) -> None:
    """Copy every byte once, with as many threads as a save uses."""
    if weights[0].is_cuda:
        for output, weight in zip(outputs, weights, strict=True):
            output.copy_(weight)
        return
    copy_rows([strided.as_rows(weight) for weight in weights], outputs)


def copy_rows(series: Sequence[Sequence[strided.Rows]], outputs: Tensors) -> None:
    """Copy runs of CPU memory, packing them into each output."""
    rows = []
    for of_one, output in zip(series, outputs, strict=True):
        address = output.data_ptr()
        for origin in of_one:
            rows.append((address, origin.address, origin.nbytes, origin.number, origin.pitch))
            address += origin.nbytes * origin.number
    native.copy_runs(*(array("q", column) for column in zip(*rows, strict=True)), settings.io_threads())


def copy_to_new(weights: Tensors) -> None:
    parallel_copy([torch.empty_like(weight) for weight in weights], weights)


def documented_function(k: int, weights: Tensors) -> None:
    """Call the function that the documented API offers for a whole state dict."""
    names = [f"mlp.experts.linear_fc1.weight{number}" for number in range(len(weights))]
    with contextlib.redirect_stdout(None):  # it logs a line for the user
        _process_state_dict_for_glu_interleaving(dict(zip(names, weights, strict=True)), k, interleave=False)


def transpose(k: int, weights: Tensors) -> None:
    for weight in weights:
        weight.view(-1, 2, k, weight.shape[1]).transpose(0, 1).contiguous().view(weight.shape)


def chunk_and_stack(k: int, weights: Tensors) -> None:
    for weight in weights:
        torch.stack([half.squeeze(1) for half in weight.view(-1, 2, k, weight.shape[1]).chunk(2, 1)])


def views_of(weight: torch.Tensor, k: int) -> Tensors:
    """Return its gate and up rows as views, as a save sees them."""
    half = weight.shape[0] // 2
    return [view for first in (0, half) if (view := contiguous_view(weight, k, first, half)) is not None]


def staged(k: int, outputs: Tensors, weights: Tensors) -> None:
    """Stage the way a save does: runs of k rows, gathered while they are copied."""
    if weights[0].is_cuda:
        _permute_on_gpu(k, outputs, weights)
        return
    copy_rows([[r for view in views_of(w, k) for r in strided.as_rows(view)] for w in weights], outputs)


def _permute_on_gpu(k: int, outputs: Tensors, weights: Tensors) -> None:
    kernels: Any = native.cuda()
    columns = [
        [t.data_ptr() for t in outputs],
        [t.data_ptr() for t in weights],
        [t.shape[0] for t in weights],
        [t.nbytes // t.shape[0] for t in weights],
        [k] * len(weights),
    ]
    stream = torch.cuda.current_stream().cuda_stream
    kernels.permute_rows(*(array("q", c) for c in columns), False, weights[0].device.index, stream)


def torch_into_used(k: int, outputs: Tensors, weights: Tensors) -> None:
    for output, weight in zip(outputs, weights, strict=True):
        width = weight.shape[1]
        output.view(2, -1, k, width).copy_(weight.view(-1, 2, k, width).transpose(0, 1))


def on_device(run: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    """Wrap the call so that it also waits for the GPU, if there is one."""

    def call() -> None:
        run(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def give_free_memory_back() -> None:
    """Release freed memory to the system, so that the next contestant gets fresh pages."""
    ctypes.CDLL(None).malloc_trim(0)


def do_nothing() -> None:
    """Do nothing; runs that write into existing memory need no preparation."""


def alone(report: harness.Report, title: str, weights: Tensors, rounds: int) -> None:
    """Measure one set of weights; add both its tables to the report."""
    nbytes = sum(weight.nbytes for weight in weights)
    outputs = [torch.zeros_like(weight) for weight in weights]
    kinds: dict[str, tuple[Callable[[], None], Mapping[str, Callable[..., None]], Sequence[Any]]] = {
        "into new memory": (
            on_device(copy_to_new, weights),
            {
                "ckpt_fast": documented_function,
                "transpose, contiguous": transpose,
                "chunk, stack": chunk_and_stack,
            },
            (weights,),
        ),
        "into used memory": (
            on_device(parallel_copy, outputs, weights),
            {"ckpt_fast": staged, "torch copy_": torch_into_used},
            (outputs, weights),
        ),
    }
    for kind, (limit, functions, arguments) in kinds.items():
        before = give_free_memory_back if "new" in kind else do_nothing
        contestants = [harness.Contestant("limit: copy", limit, before)]
        for k in SIZES:
            for name, function in functions.items():
                run = on_device(function, k, *arguments)
                contestants.append(harness.Contestant(f"{name}, k={k}", run, before))
        times = harness.measure(contestants, rounds)[harness.TOTAL]
        what = f"{title}, {kind}, {nbytes / 1e6:.0f} MB on {weights[0].device.type}, {rounds} rounds"
        report.add(harness.table(what, times, contestants, nbytes, None, "limit: copy"))


def described(tensors: Mapping[str, torch.Tensor], k: int | None) -> dict[str, Any]:
    """Return the entries of a state dict, as Megatron-Core's MLP builds them."""
    entries = {}
    for name, tensor in tensors.items():
        sharded = compat.ShardedTensor.from_rank_offsets(f"{name}.linear_fc1.weight", tensor)
        factory = apply_swiglu_sharded_factory(sharded, ())
        entries[name] = factory if k is None else interleaved(factory, k)
    return entries


def save(entries: dict[str, Any], path: Path) -> None:
    path.mkdir(exist_ok=True)
    job = torch_dist.start_save(entries, str(path), torch_dist.FastSaveStrategy())
    job.write()
    job.commit()


def inside(report: harness.Report, scale: float, rounds: int, path: Path) -> None:
    """Measure a save and a load with interleaving (by views and by copies) and without."""
    shape = (ROWS, max(16, int(WIDTH * scale)))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, dtype in STATES.items()}
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    limit = "limit: without interleaving"

    def copies_first(k: int) -> None:
        copies = {name: _deinterleave_glu_tensor(tensor, k) for name, tensor in tensors.items()}
        save(described(copies, None), path / "save")

    def copies_afterwards(k: int) -> None:
        loaded = torch_dist.load(described(into, None), str(path / "load"))
        for name, tensor in into.items():
            tensor.copy_(_interleave_glu_tensor(loaded[name], k))

    def load(k: int | None) -> None:
        loaded = torch_dist.load(described(into, k), str(path / "load"))
        for name, tensor in into.items():
            if loaded[name] is not tensor:  # merged by Megatron-Core
                tensor.copy_(loaded[name])

    saves = [harness.Contestant(limit, lambda: save(described(tensors, None), path / "save"))]
    loads = [harness.Contestant(limit, partial(load, None))]
    for k in SIZES:
        saves += [
            harness.Contestant(f"ckpt_fast, k={k}", partial(_save_interleaved, tensors, k, path / "save")),
            harness.Contestant(f"by copies, k={k}", partial(copies_first, k)),
        ]
        loads += [
            harness.Contestant(f"ckpt_fast, k={k}", partial(load, k)),
            harness.Contestant(f"by copies, k={k}", partial(copies_afterwards, k)),
        ]
    save(described(tensors, None), path / "load")
    rivals.bring_into_page_cache(path / "load")
    for what, contestants in (("durable save", saves), ("warm load", loads)):
        times = harness.measure(contestants, rounds)[harness.TOTAL]
        title = f"{what} of fc1 with its Adam state, {nbytes / 1e6:.0f} MB, {rounds} rounds"
        report.add(harness.table(title, times, contestants, nbytes, None, limit))


def _save_interleaved(tensors: Mapping[str, torch.Tensor], k: int, path: Path) -> None:
    save(described(tensors, k), path)


def main() -> None:
    options = harness.parse_arguments(__doc__)
    report = harness.Report(options)
    for device in ["cpu", *(["cuda"] if native.cuda() is not None else [])]:
        for title, (count, rows, full_width) in WEIGHTS.items():
            width = max(16, int(full_width * options.gigabytes))
            weights = [torch.zeros(rows, width, dtype=torch.bfloat16, device=device) for _ in range(count)]
            alone(report, title, weights, options.rounds)
    inside(report, options.gigabytes, options.rounds, options.path)
    report.finish()


if __name__ == "__main__":
    main()
