# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the tests of their verification, and single-bit damages to them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import run_ranks
from tests.models import Setup
from tests.trainer.training import save_steps

SETUP = Setup(distributed=True, reshardable=True)


def save_run(root: Path, steps: int = 2) -> Path:
    """Save checkpoints of a run with a data loader, as training does."""
    run_ranks(save_steps, 1, SETUP, str(root), steps, {}, True)
    return root


def flips(path: Path, count: int | None = None, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Flip one bit after the other, or ``count`` random ones, and yield byte and bit; restored at the end."""
    content = path.read_bytes()
    bits = range(8 * len(content))
    try:
        for bit in bits if count is None else random.Random(seed).sample(bits, min(count, len(bits))):
            byte, number = divmod(bit, 8)
            changed = bytearray(content)
            changed[byte] ^= 1 << number
            path.write_bytes(changed)
            yield byte, number
    finally:
        path.write_bytes(content)


def small_files(directory: Path) -> list[Path]:
    """Return all files of a checkpoint but those of data."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix != ".distcp")
