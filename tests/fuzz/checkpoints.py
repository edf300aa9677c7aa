# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to be damaged, each saved twice with other values, and what loading each must give."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast.format.types import TensorShard
from tests.manifests import make_older
from tests.saves import save

PIECES = ((0, 0), (0, 32), (48, 0))
PIECE_SIZES = ((48, 32), (48, 32), (16, 64))


def state_of(seed: int) -> dict[str, Any]:
    """Return a state dict of everyday tensors and objects."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(64, 64, generator=generator)
    return {
        "model": {
            "weight": matrix,
            "transposed": torch.randn(24, 40, generator=generator).t(),
            "half": torch.randn(7, 1, 5, generator=generator).bfloat16(),
            "flags": torch.rand(33, generator=generator) > 0.5,
            "scalar": torch.tensor(float(seed)),
            "empty": torch.zeros(0, 4),
        },
        "groups": [{"lr": 0.1 * seed, "betas": (0.9, 0.95), "name": f"group of {seed}"}],
        "step": 1000 + seed,
    }


class Kind(NamedTuple):
    """A kind of checkpoint.

    Attributes:
        save: save a state into a directory.
        loads_are_checked: whether a load compares every value with a checksum that only one save has.
        is_verified: whether every byte has a checksum, so that a deep verification sees any change; but for
            the sidecar of older versions.
    """

    save: Callable[[dict[str, Any], Path], None]
    loads_are_checked: bool
    is_verified: bool


def _save_ours(state: dict[str, Any], directory: Path) -> None:
    ckpt_fast.save(state, directory)


def _save_older(state: dict[str, Any], directory: Path) -> None:
    ckpt_fast.save(state, directory)
    make_older(directory)


def _save_stock(state: dict[str, Any], directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=directory)


def _save_in_pieces(state: dict[str, Any], directory: Path) -> None:
    """One tensor in three pieces, as three ranks have them, with files beside it."""
    weight = state["model"]["weight"]
    save(
        [
            TensorShard("model.weight", _piece(weight, offsets, sizes), offsets, (64, 64))
            for offsets, sizes in zip(PIECES, PIECE_SIZES, strict=True)
        ],
        str(directory),
        common_files={"common.pt": b"common" * state["step"]},
        seal_files={"metadata.json": b'{"sharded_backend": "torch_dist"}'},
    )


def _piece(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor.contiguous()


KINDS = {
    "ours": Kind(_save_ours, loads_are_checked=True, is_verified=True),
    "pieces": Kind(_save_in_pieces, loads_are_checked=True, is_verified=True),
    # Of the time before the manifest: a load has the checksums in the archives, which any save's are right.
    "older": Kind(_save_older, loads_are_checked=False, is_verified=True),
    "stock": Kind(_save_stock, loads_are_checked=False, is_verified=False),
}
