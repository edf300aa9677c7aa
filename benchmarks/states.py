# SPDX-License-Identifier: Apache-2.0
"""The states that are saved and loaded: flat, name to tensor, filled with random bytes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

import torch

State = dict[str, torch.Tensor]

# A parameter costs 14 bytes: bf16 weight, fp32 master weight and two fp32 moments.
_COPIES = {
    "model": torch.bfloat16,
    "optimizer.fp32_param": torch.float32,
    "optimizer.exp_avg": torch.float32,
    "optimizer.exp_avg_sq": torch.float32,
}
_BYTES_PER_PARAMETER = 14
# In units of hidden * hidden: the embedding, and the matrices of one layer.
_EMBEDDING, _LAYER = 32, 12.25
# Above this size a state grows in layers, so that no tensor exceeds about 100 MB.
_MAX_HIDDEN, _HIDDEN_STEP = 896, 64
_USUAL_LAYERS = 5

_RANDOM_BYTES = 1 << 20


def chosen(options: argparse.Namespace) -> State:
    """Return the state that the command line asks for."""
    return many_tensors(options.gigabytes) if options.many else llama_like(options.gigabytes)


def llama_like(gigabytes: float, seed: int = 0) -> State:
    """Weights and Adam state of a Llama: 128 tensors per 5 layers, of about 2 KB to 100 MB at 1 GB."""
    parameters = gigabytes * 1e9 / _BYTES_PER_PARAMETER
    usual = math.sqrt(parameters / (_EMBEDDING + _LAYER * _USUAL_LAYERS))
    hidden = min(max(round(usual / _HIDDEN_STEP), 1) * _HIDDEN_STEP, _MAX_HIDDEN)
    layers = max(1, round((parameters / hidden**2 - _EMBEDDING) / _LAYER))
    shapes = {"embedding.word_embeddings.weight": (32 * hidden, hidden), "final_layernorm.weight": (hidden,)}
    for layer in range(layers):
        for name, shape in _layer_shapes(hidden).items():
            shapes[f"decoder.layers.{layer}.{name}"] = shape
    return _all_copies(shapes, seed)


def wide_layer(gigabytes: float, seed: int = 0) -> State:
    """Weights and Adam state of one Llama layer, wider than those of ``llama_like``: 2304 at 1 GB."""
    hidden = math.sqrt(gigabytes * 1e9 / _BYTES_PER_PARAMETER / _LAYER)
    return _all_copies(_layer_shapes(max(round(hidden / _HIDDEN_STEP), 1) * _HIDDEN_STEP), seed)


def _all_copies(shapes: Mapping[str, tuple[int, ...]], seed: int) -> State:
    fill = _Filler(seed)
    return {
        f"{copy}.{name}": fill(shape, dtype)
        for copy, dtype in _COPIES.items()
        for name, shape in shapes.items()
    }


def _layer_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    ffn = hidden * 11 // 4
    return {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": (3 * hidden, hidden),
        "self_attention.linear_proj.weight": (hidden, hidden),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }


def many_tensors(gigabytes: float = 0.27, nbytes: int = 27_000, seed: int = 0) -> State:
    """Tensors of 27 KB each, dominated by the work per tensor; 10 000 of them are 0.27 GB."""
    fill, count = _Filler(seed), max(1, round(gigabytes * 1e9 / nbytes))
    return {
        f"experts.{n // 100}.weight_{n % 100}": fill((nbytes // 2,), torch.bfloat16) for n in range(count)
    }


def total_nbytes(state: State) -> int:
    """Return the number of bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def empty_like(state: State) -> State:
    """Return tensors of the same shapes and dtypes, in memory that has been touched."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def assert_equal(loaded: State, saved: State) -> None:
    """Compare bit by bit: random bytes contain NaNs, which do not equal themselves."""
    for name, tensor in saved.items():
        same = torch.equal(loaded[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        if not same:
            raise AssertionError(f"{name} was not loaded as it was saved")


class _Filler:
    """Makes tensors of random bytes quickly: each repeats one block, from a different starting point."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        block = torch.randint(0, 256, (_RANDOM_BYTES,), dtype=torch.uint8, generator=generator)
        self._twice = torch.cat([block, block])
        self._shift = 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        target = tensor.view(-1).view(torch.uint8)
        self._shift = (self._shift + 4099) % _RANDOM_BYTES
        block = self._twice[self._shift : self._shift + min(_RANDOM_BYTES, target.numel())]
        whole = target.numel() // block.numel() * block.numel()
        target[:whole].view(-1, block.numel()).copy_(block)
        target[whole:].copy_(block[: target.numel() - whole])
        return tensor
