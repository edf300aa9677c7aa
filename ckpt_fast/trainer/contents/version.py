# SPDX-License-Identifier: Apache-2.0
"""The version of the state dict's layout that this process has loaded."""

from __future__ import annotations

_CHECKPOINT_VERSION: float | None = None


def set_checkpoint_version(value: float) -> None:
    """Set the checkpoint version of this process.

    Raises:
        AssertionError: another version was set before; one process reads checkpoints of one version.
    """
    global _CHECKPOINT_VERSION
    if _CHECKPOINT_VERSION is not None and value != _CHECKPOINT_VERSION:
        raise AssertionError(
            f"checkpoint versions do not match: this process has loaded version {_CHECKPOINT_VERSION}, "
            f"the checkpoint at hand has version {value}"
        )
    _CHECKPOINT_VERSION = value


def get_checkpoint_version() -> float | None:
    """The checkpoint version, or None before anything was loaded."""
    return _CHECKPOINT_VERSION
