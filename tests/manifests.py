# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of manifests."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from ckpt_fast import verify
from ckpt_fast.format.manifest import Manifest, append_manifest, split_manifest
from ckpt_fast.retention.line import LINE, SAVED_AT

# Not described by the manifest, because it contains it.
TABLE = ".metadata"


def manifest_of(directory: Path, name: str = TABLE) -> Manifest:
    """Return the manifest of a checkpoint, which must have one."""
    _, manifest = split_manifest((directory / name).read_bytes())
    assert manifest is not None
    return manifest


def manifest_lies(directory: Path) -> list[str]:
    """Return the names for which the manifest and the directory disagree."""
    files = manifest_of(directory).files
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {TABLE}
    wrong = sorted(present.symmetric_difference(files))
    for name in present.intersection(files):
        content = (directory / name).read_bytes()
        if files[name][1:] != (len(content), zlib.crc32(content)):
            wrong.append(name)
    return wrong


def find_damage(directory: str) -> list[str]:
    """Return the defects of a checkpoint, every byte of which is read."""
    return list(verify(directory, deep=True).damages)


def without_ids(content: bytes) -> bytes:
    """Return a ``.metadata`` file without what sets it apart from another save's: ids of save and run,
    and the time."""
    pickled, manifest = split_manifest(content)
    assert manifest is not None
    manifest.save_id = ""
    if LINE in manifest.notes:
        manifest.notes[LINE] = [["", iteration] for _, iteration in manifest.notes[LINE]]
        manifest.notes[SAVED_AT] = 0
    return append_manifest(pickled, manifest)


def make_older(directory: Path) -> None:
    """Make the checkpoint look like one from before the manifest: with a sidecar."""
    path = directory / TABLE
    pickled, manifest = split_manifest(path.read_bytes())
    assert manifest is not None
    path.write_bytes(pickled)
    named = [(name, file.nbytes, file.crc32) for name, file in manifest.files.items() if "." in name]
    named = [each for each in named if each[0].endswith(".distcp") or each[0] == "common.pt"]
    named.append((TABLE, len(pickled), zlib.crc32(pickled)))
    files = {name: {"nbytes": nbytes, "crc32": f"{crc:08x}"} for name, nbytes, crc in sorted(named)}
    (directory / "ckpt_fast.json").write_text(json.dumps({"version": 1, "files": files}, indent=1))
