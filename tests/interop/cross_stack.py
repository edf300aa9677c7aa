# SPDX-License-Identifier: Apache-2.0
"""The other stack's half of ``test_cross_stack``, run by the other stack's Python.

    python -m tests.interop.cross_stack READ WRITE

Reads the checkpoints below READ, which the test's own stack wrote, and prints as JSON what differs; writes
its own below WRITE.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from typing import Any

import torch

from tests.interop import saved
from tests.models import Setup

# The state of the other sharding depends on the buckets of one version of megatron-core.
SETUP = Setup(distributed=True, reshardable=True, bf16=True)


def read(rank: int, root: str) -> dict[str, Any]:
    """Return the differences, by reader (or "resume", for load_checkpoint) and writer."""
    wrong: dict[str, Any] = {"resume": saved.resume_all(rank, SETUP, root)}
    # Stock readers before 0.19 cannot handle what stock writers from 0.19 on leave out.
    old_reader_new_writer = "common.pt" in _files_of_own_stock() and "common.pt" not in os.listdir(
        saved.iteration(root, "stock")
    )
    skipped = {("stock", "stock"), ("stock", "strategy")} if old_reader_new_writer else set()
    for (writer, reader), names in saved.read_all(rank, SETUP, root, skipped).items():
        wrong.setdefault(reader, {})[writer] = names
    return wrong


def _files_of_own_stock() -> list[str]:
    with tempfile.TemporaryDirectory() as root:
        saved.save_with_all(0, Setup(), root, writers=("stock",))
        return os.listdir(saved.iteration(root, "stock"))


def main() -> None:
    read_from, write_to = sys.argv[1:]
    with tempfile.NamedTemporaryFile() as rendezvous, contextlib.redirect_stdout(sys.stderr):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous.name}.d", rank=0, world_size=1
        )
        wrong = read(0, read_from)
        saved.save_with_all(0, SETUP, write_to)
        torch.distributed.destroy_process_group()
    json.dump(wrong, sys.stdout)


if __name__ == "__main__":
    main()
