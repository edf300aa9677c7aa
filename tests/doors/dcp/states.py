# SPDX-License-Identifier: Apache-2.0
"""States to save with torch DCP, and how to compare what is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.pipeline.layouts import PLAIN_DTYPES, random_tensor, same


def training_state(seed: int = 0) -> dict[str, Any]:
    """Return a model and its optimizer after a step, and what trainers keep beside them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 5), nn.BatchNorm1d(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01 + seed)
    model(torch.randn(4, 48)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 17 + seed,
        "trainer": {
            "losses": [0.5, 0.25 + seed],
            "name": f"run {seed}",
            "betas": (0.9, seed),
            "seen": {"wiki", "books"},
            "nothing": None,
            "generators": [torch.get_rng_state(), {"inner": torch.arange(3) + seed}],
        },
    }


def odd_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return every dtype, and the shapes, strides and views that are easy to get wrong."""
    matrix = random_tensor((6, 10), torch.float32, seed)
    wave = torch.complex(random_tensor((4, 5), torch.float32, seed), torch.full((4, 5), 2.0))
    return {
        **{f"plain.{dtype}": random_tensor((3, 7), dtype, seed) for dtype in PLAIN_DTYPES},
        "scalar": torch.tensor(3.5 + seed),
        "scalar.int": torch.tensor(-7 - seed),
        "empty": torch.empty(0),
        "empty.rows": torch.empty(0, 9, dtype=torch.bfloat16),
        "empty.columns": torch.empty(4, 0, dtype=torch.int8),
        "transposed": matrix.t(),
        "strided": matrix[::2, 1::3],
        "row": matrix[3],
        "expanded": torch.tensor([[1.0 + seed], [2.0]]).expand(2, 300),
        "channels_last": random_tensor((2, 3, 4, 5), torch.float16, seed).to(
            memory_format=torch.channels_last
        ),
        "conjugate": wave.conj(),
        "negative": wave.conj().imag,
        "parameter": nn.Parameter(matrix * 2),
        "large": random_tensor((300, 1000), torch.float32, seed),
    }


def blank(value: Any) -> Any:
    """Return the same structure with other values: a state dict to load into."""
    if isinstance(value, torch.Tensor):
        # Not every dtype can be filled with zeros by torch.
        zeros = torch.zeros(value.numel() * value.itemsize, dtype=torch.uint8)
        return zeros.view(value.dtype).view(value.shape)
    if isinstance(value, dict):
        return {key: blank(child) for key, child in value.items()}
    if isinstance(value, list):
        return [blank(child) for child in value]
    return "to be loaded"


def differences(expected: Any, found: Any, name: str = "") -> list[str]:
    """Return the names of values that are not bitwise identical."""
    if isinstance(expected, torch.Tensor):
        equal = isinstance(found, torch.Tensor) and same(expected.detach(), found.detach())
        return [] if equal else [name]
    if isinstance(expected, dict):
        if not isinstance(found, dict) or expected.keys() != found.keys():
            return [name]
        return [d for key in expected for d in differences(expected[key], found[key], f"{name}.{key}")]
    if isinstance(expected, (list, tuple)):
        if type(expected) is not type(found) or len(expected) != len(found):
            return [name]
        pairs = enumerate(zip(expected, found, strict=True))
        return [d for number, (a, b) in pairs for d in differences(a, b, f"{name}.{number}")]
    return [] if type(expected) is type(found) and expected == found else [name]
