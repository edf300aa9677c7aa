# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint's storage writer and reader on the ckpt_fast pipeline.

    dcp.save(state_dict, storage_writer=FastStorageWriter(path))
    dcp.load(state_dict, storage_reader=FastStorageReader(path))

Planning stays with torch: DTensors, FSDP2, flattened state dicts, partial loads and plan caching work as they
do with torch's own file system writer, and each side reads what the other has written. With
``planner=FastSavePlanner()`` and ``FastLoadPlanner()`` it takes a fraction of the time. ``direct`` has
``ckpt_fast.save``, ``async_save`` and ``load``, which plan by themselves.
"""

from ckpt_fast.doors.dcp.planning.planners import FastLoadPlanner, FastSavePlanner
from ckpt_fast.doors.dcp.reader import FastStorageReader
from ckpt_fast.doors.dcp.writer import FastStorageWriter

__all__ = ["FastLoadPlanner", "FastSavePlanner", "FastStorageReader", "FastStorageWriter"]
