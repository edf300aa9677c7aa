# SPDX-License-Identifier: Apache-2.0
"""Inspect a torch_dist checkpoint without ckpt_fast: stock megatron-core, torch and zipfile."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
import torch.distributed
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader


def damaged_items(directory: Path) -> tuple[int, list[str]]:
    """Test every item of the checkpoint as ``unzip -t`` would.

    Returns:
        (number of items, names of those that are not a ZIP archive or fail their CRC-32).
    """
    storage = FileSystemReader(str(directory)).read_metadata().storage_data
    damaged = []
    for index, extent in storage.items():
        with (directory / extent.relative_path).open("rb") as file:
            file.seek(extent.offset)
            content = io.BytesIO(file.read(extent.length))
        try:
            with zipfile.ZipFile(content) as archive:
                sound = archive.testzip() is None
        except zipfile.BadZipFile:
            sound = False
        if not sound:
            damaged.append(index.fqn)
    return len(storage), damaged


def different_tensors(first: Path, second: Path) -> tuple[int, list[str]]:
    """Load two checkpoints with stock megatron-core, in a single-process group, and compare them.

    The distributed optimizer's flat tensors are only comparable if every parameter has a multiple of 64
    elements: otherwise megatron-core pads them with uninitialized memory.

    Returns:
        (number of tensors, names of those that are missing in one or differ in any bit).
    """
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        one, two = _tensors(first), _tensors(second)
    finally:
        torch.distributed.destroy_process_group()
    names = sorted(one.keys() | two.keys())
    return len(names), [name for name in names if not _identical(one.get(name), two.get(name))]


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    loaded = dist_checkpointing.load_plain_tensors(str(directory))  # is stored with the common state
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _identical(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None or one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8)
    )
