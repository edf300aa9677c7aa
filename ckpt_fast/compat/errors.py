# SPDX-License-Identifier: Apache-2.0
"""The kinds of error that callers of Megatron-Core and nvidia-resiliency-ext catch."""

from __future__ import annotations

import importlib
import traceback

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException


class DistCheckpointingError(CheckpointingException, CheckpointException):  # type: ignore[misc]
    """The kind of error of Megatron-Core's ``dist_checkpointing``.

    It raises its own CheckpointingException, or lets torch's CheckpointException through: which of the two
    depends on who notices first.
    """

    @property
    def failures(self) -> dict[int, tuple[BaseException, traceback.StackSummary]]:
        """Empty: the message names the rank that failed, and ``__cause__`` is its error."""
        return {}


def import_local_checkpointing_error() -> type[Exception]:
    """The kind of error of nvidia-resiliency-ext's local checkpoint managers.

    Raises:
        ImportError: nvidia-resiliency-ext is missing.
    """
    package = "nvidia_resiliency_ext.checkpointing.local.ckpt_managers"
    kind: type[Exception] = importlib.import_module(f"{package}.base_manager").CheckpointingException
    return kind
