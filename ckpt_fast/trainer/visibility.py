# SPDX-License-Identifier: Apache-2.0
"""Ranks that see different directories: behind the caches of a network file system, or on disks of their own.

Rank 0 decides which checkpoint is loaded. The others look until they see the same one, for as long as
``CKPT_FAST_VISIBLE_TIMEOUT`` says.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping

from ckpt_fast import settings
from ckpt_fast.doors.common_state import COMMON_FILE
from ckpt_fast.errors import CheckpointError
from ckpt_fast.megatron import object_storage
from ckpt_fast.pipeline.commit import METADATA_FILE, SEAL_FILE
from ckpt_fast.pipeline.fingerprint import Fingerprint, fingerprints
from ckpt_fast.pipeline.group import ControlGroup

View = Mapping[str, Fingerprint | None]

_NAMES = (METADATA_FILE, SEAL_FILE, COMMON_FILE)
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_MOST_RANKS_NAMED = 4


def require_same_view(directory: str) -> None:
    """Return when every rank sees the checkpoint that rank 0 sees in ``directory``. Collective.

    Object storage shows everybody the same.

    Raises:
        CheckpointError: on every rank, if some still see another one, or none, when the time is over.
    """
    ranks = ControlGroup()
    if ranks.size == 1 or object_storage(directory):
        return
    expected, timeout_s = ranks.decide(
        lambda: (fingerprints(directory, _NAMES), settings.visible_timeout_s())
    )
    seen = expected if ranks.is_coordinator else _wait_for(expected, directory, timeout_s)
    if ranks.all_true(seen == expected):
        return
    views = ranks.gather((ranks.rank, socket.gethostname(), seen))
    ranks.decide(lambda: _refuse(directory, views, timeout_s))


def _wait_for(expected: View, directory: str, timeout_s: float) -> View:
    """What this rank sees: what is expected, or what there is when the time is over."""
    deadline = time.monotonic() + timeout_s
    pause = _FIRST_PAUSE_S
    while (seen := fingerprints(directory, _NAMES)) != expected and time.monotonic() < deadline:
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    return seen


def _refuse(directory: str, views: list[tuple[int, str, View]], timeout_s: float) -> None:
    (_, node, expected), *others = views
    different = [(rank, host, seen) for rank, host, seen in others if seen != expected]
    named = "; ".join(
        f"rank {rank} ({host}) sees {_difference(expected, seen)}"
        for rank, host, seen in different[:_MOST_RANKS_NAMED]
    )
    if len(different) > _MOST_RANKS_NAMED:
        named += f"; {len(different) - _MOST_RANKS_NAMED} more ranks differ"
    raise CheckpointError(
        f"not all ranks see the same checkpoint in {directory}: rank 0 ({node}) sees a whole one, but "
        f"{named}. "
        "All ranks must be given a directory on a file system that they share. If they are, it is slow to "
        "show what was written: CKPT_FAST_VISIBLE_TIMEOUT is how many seconds the ranks wait for it "
        f"({timeout_s:g} now)."
    )


def _difference(expected: View, seen: View) -> str:
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
