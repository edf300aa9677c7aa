# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that have a manifest with notes, and one small data file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ckpt_fast.format.manifest import Manifest, append_manifest, file_record, new_save_id
from ckpt_fast.retention.stored import Stored


def write(
    root: Path,
    iteration: int,
    notes: dict[str, Any] | None = None,
    *,
    nbytes: int = 100,
    age_s: float = 0.0,
    whole: bool = True,
    sealed: bool = True,
) -> Path:
    """Write a checkpoint; not ``whole``: a part of its data is missing."""
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    content = bytes(nbytes)
    (directory / "__0_0.distcp").write_bytes(content if whole else content[:-1])
    if sealed:
        manifest = Manifest(new_save_id(), [file_record("__0_0.distcp", content)], notes=notes)
        (directory / ".metadata").write_bytes(append_manifest(b"\x80\x04N.", manifest))
        begun = time.time() - age_s
        os.utime(directory / ".metadata", (begun, begun))
    return directory


def found_in(root: Path) -> list[Stored]:
    """Return the checkpoints of a directory, oldest first."""
    return [Stored(int(path.name[5:]), str(path)) for path in sorted(root.glob("iter_*"))]
