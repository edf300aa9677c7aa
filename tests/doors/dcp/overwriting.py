# SPDX-License-Identifier: Apache-2.0
"""A process that saves repeatedly to the directory that ``test_one_save`` loads from.

Everything in save ``n`` is ``n``: the object, and every element.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ckpt_fast import FastStorageWriter

WRITERS: dict[str, Any] = {
    "ours": FastStorageWriter,
    "ours-2-files": lambda path: FastStorageWriter(path, thread_count=2),
    "stock": dcp.FileSystemWriter,
}


def state(number: int) -> dict[str, Any]:
    """Return tensors that are read in place, by rows, converted and whole, and an object after them."""
    value = float(number)
    return {
        "wide": torch.full((64, 1024), value),
        "narrow": torch.full((512, 16), value),
        "half": torch.full((777,), value, dtype=torch.bfloat16),
        "step": number,
    }


def save(directory: str, writer: str, number: int) -> None:
    dcp.save(state(number), storage_writer=WRITERS[writer](directory), no_dist=True)


def save_beside(directory: str, writer: str, number: int) -> None:
    """Save under another name and rename, as users do who want to keep the old checkpoint until then."""
    save(f"{directory}.new", writer, number)
    os.rename(directory, f"{directory}.old")
    os.rename(f"{directory}.new", directory)
    shutil.rmtree(f"{directory}.old")


def main(directory: str, writer: str, manner: str) -> None:
    """Save until the parent ends it, or is gone."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    saving = {"in place": save, "beside": save_beside}[manner]
    parent = os.getppid()
    for number in itertools.count(1):
        saving(directory, writer, number % 100 + 1)
        time.sleep(number % 3 / 100)  # now and then, leave time for a load
        if os.getppid() != parent:
            return
