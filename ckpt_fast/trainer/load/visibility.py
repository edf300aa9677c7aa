# SPDX-License-Identifier: Apache-2.0
"""Ranks that see different directories: behind the caches of a network file system, or on disks of their own.

Rank 0 decides which checkpoint is loaded. The others look until they see the same one, for as long as
``CKPT_FAST_VISIBLE_TIMEOUT`` says.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.names import COMMON_FILE, METADATA_FILE, SEAL_FILE
from ckpt_fast.pipeline.load.fingerprint import Fingerprint, fingerprints
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.storage.objects.client import object_storage

_NAMES = (METADATA_FILE, SEAL_FILE, COMMON_FILE)
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True)
class View:
    """The view that rank 0 has of a checkpoint, and how long the others may take to see the same.

    Attributes:
        node: of rank 0.
        files: name to fingerprint of each file that is compared.
        timeout_s: for the others.
    """

    node: str
    files: dict[str, Fingerprint | None]
    timeout_s: float


def view_of(checkpoint: OpenCheckpoint) -> View | None:
    """On rank 0: what the others must see. None if there are none, or all see the same: in object storage."""
    if ControlGroup().size == 1 or object_storage(checkpoint.name):
        return None
    return View(socket.gethostname(), fingerprints(checkpoint, _NAMES), settings.visible_timeout_s())


def wait_for_view(checkpoint: OpenCheckpoint, expected: View | None) -> None:
    """Local. Return when this rank sees in ``checkpoint`` what rank 0 has seen.

    Raises:
        CheckpointError: it still sees another one, or none, when the time is over.
    """
    if expected is None or ControlGroup().is_coordinator:
        return
    deadline = time.monotonic() + expected.timeout_s
    pause = _FIRST_PAUSE_S
    while (seen := fingerprints(checkpoint, _NAMES)) != expected.files:
        if time.monotonic() >= deadline:
            raise CheckpointError(_difference(checkpoint.name, expected, seen))
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
        checkpoint.forget()


def _difference(directory: str, expected: View, seen: dict[str, Fingerprint | None]) -> str:
    this = f"rank {ControlGroup().rank} ({socket.gethostname()})"
    return (
        f"not all ranks see the same checkpoint in {directory}: rank 0 ({expected.node}) sees a whole one, "
        f"but {this} sees {_instead(expected.files, seen)}. "
        "All ranks must be given a directory on a file system that they share. If they are, it is slow to "
        "show what was written: CKPT_FAST_VISIBLE_TIMEOUT is how many seconds the ranks wait for it "
        f"({expected.timeout_s:g} now)."
    )


def _instead(expected: dict[str, Fingerprint | None], seen: dict[str, Fingerprint | None]) -> str:
    if not any(seen.values()):
        return "none"
    name = next(name for name in expected if seen[name] != expected[name])
    theirs, wanted = seen[name], expected[name]
    if theirs is None:
        return f"no {name}"
    if wanted is None:
        return f"a {name} that rank 0 does not"
    return (
        f"another {name} ({theirs.nbytes} bytes, CRC-32 {theirs.crc32:08x}; rank 0: {wanted.nbytes} bytes, "
        f"CRC-32 {wanted.crc32:08x})"
    )
