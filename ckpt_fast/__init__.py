# SPDX-License-Identifier: Apache-2.0
"""Fast, crash-safe training checkpoints in the files Megatron and torch already read.

The documented API is in ``ckpt_fast.checkpointing``. ``save``, ``async_save`` and ``load`` are for FSDP2 and
plain PyTorch. The classes here are for programs that already save with torch DCP or Megatron-Core: pass them
where those take a storage writer, a reader or a strategy.
``resume_dataloader`` goes with ``load_checkpoint``: it puts the data loader where the checkpoint left it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_fast.doors.dcp import FastLoadPlanner, FastSavePlanner, FastStorageReader, FastStorageWriter
    from ckpt_fast.doors.dcp.direct.functions import async_save, load, save
    from ckpt_fast.doors.install import install, uninstall
    from ckpt_fast.doors.local.manager import FastLocalCheckpointManager
    from ckpt_fast.doors.megatron.load_strategy import FastLoadStrategy
    from ckpt_fast.doors.megatron.torch_dist import FastSaveStrategy
    from ckpt_fast.format.inert.classes import allow_class
    from ckpt_fast.jobs.background import wait_staged
    from ckpt_fast.jobs.metrics import add_listener
    from ckpt_fast.jobs.report import SaveReport
    from ckpt_fast.manager.manager import CheckpointManager
    from ckpt_fast.pipeline.memory.host_buffer import reserve_host_memory
    from ckpt_fast.pipeline.save.seal import last_report
    from ckpt_fast.retention.policies import (
        KeepBest,
        KeepEvery,
        KeepFor,
        KeepIf,
        KeepNewest,
        MaxBytes,
        StoredCheckpoint,
    )
    from ckpt_fast.run.config_targets import register_config_target
    from ckpt_fast.tools.inspect import Inspection, inspect
    from ckpt_fast.trainer.bridge import FastCheckpointManager
    from ckpt_fast.trainer.contents.sidecars import resume_dataloader
    from ckpt_fast.verification.report import VerifyReport
    from ckpt_fast.verification.verify import verify

    __version__: str

__all__ = [
    "CheckpointManager",
    "FastCheckpointManager",
    "FastLoadPlanner",
    "FastLoadStrategy",
    "FastLocalCheckpointManager",
    "FastSavePlanner",
    "FastSaveStrategy",
    "FastStorageReader",
    "FastStorageWriter",
    "Inspection",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepIf",
    "KeepNewest",
    "MaxBytes",
    "SaveReport",
    "StoredCheckpoint",
    "VerifyReport",
    "add_listener",
    "allow_class",
    "async_save",
    "inspect",
    "install",
    "last_report",
    "load",
    "register_config_target",
    "reserve_host_memory",
    "resume_dataloader",
    "save",
    "uninstall",
    "verify",
    "wait_staged",
]

# Imported on first use: who saves with torch DCP need not wait for Megatron's import.
_HOMES = {
    "CheckpointManager": "ckpt_fast.manager.manager",
    "FastCheckpointManager": "ckpt_fast.trainer.bridge",
    "FastLoadPlanner": "ckpt_fast.doors.dcp",
    "FastLoadStrategy": "ckpt_fast.doors.megatron.load_strategy",
    "FastLocalCheckpointManager": "ckpt_fast.doors.local.manager",
    "FastSavePlanner": "ckpt_fast.doors.dcp",
    "FastSaveStrategy": "ckpt_fast.doors.megatron.torch_dist",
    "FastStorageReader": "ckpt_fast.doors.dcp",
    "FastStorageWriter": "ckpt_fast.doors.dcp",
    "Inspection": "ckpt_fast.tools.inspect",
    "KeepBest": "ckpt_fast.retention.policies",
    "KeepEvery": "ckpt_fast.retention.policies",
    "KeepFor": "ckpt_fast.retention.policies",
    "KeepIf": "ckpt_fast.retention.policies",
    "KeepNewest": "ckpt_fast.retention.policies",
    "MaxBytes": "ckpt_fast.retention.policies",
    "SaveReport": "ckpt_fast.jobs.report",
    "StoredCheckpoint": "ckpt_fast.retention.policies",
    "VerifyReport": "ckpt_fast.verification.report",
    "add_listener": "ckpt_fast.jobs.metrics",
    "allow_class": "ckpt_fast.format.inert.classes",
    "async_save": "ckpt_fast.doors.dcp.direct.functions",
    "inspect": "ckpt_fast.tools.inspect",
    "install": "ckpt_fast.doors.install",
    "last_report": "ckpt_fast.pipeline.save.seal",
    "load": "ckpt_fast.doors.dcp.direct.functions",
    "register_config_target": "ckpt_fast.run.config_targets",
    "reserve_host_memory": "ckpt_fast.pipeline.memory.host_buffer",
    "resume_dataloader": "ckpt_fast.trainer.contents.sidecars",
    "save": "ckpt_fast.doors.dcp.direct.functions",
    "uninstall": "ckpt_fast.doors.install",
    "verify": "ckpt_fast.verification.verify",
    "wait_staged": "ckpt_fast.jobs.background",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("ckpt_fast.version").version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
