# SPDX-License-Identifier: Apache-2.0
"""``ckpt_fast.json``, the record of files that versions before the manifest wrote beside ``.metadata``."""

from __future__ import annotations

import json
from typing import Any

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.documents import parse_json
from ckpt_fast.format.manifest import file_record
from ckpt_fast.format.names import METADATA_FILE, SIDECAR_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.load.decode import has_own_mark, read_sidecar
from ckpt_fast.verification.findings import Findings
from ckpt_fast.verification.report import State

# The only one that was ever written.
_VERSION = 1


def sidecar_records(found: Findings, metadata: bytes) -> list[FileRecord] | None:
    """The records in the sidecar that belongs to a ``.metadata`` file; None if none does.

    Another library that has saved to the same directory leaves a sidecar which speaks of files that are gone.

    Args:
        found: takes findings about the sidecar, and about ``.metadata`` if that has lost its mark.
        metadata: the content of ``.metadata``, without a manifest.
    """
    if SIDECAR_FILE not in found.sizes:
        return None
    content = found.read(SIDECAR_FILE)
    if content is None:
        return None
    records = None
    try:
        records = read_sidecar(found.files.directory)
        problem = _problem(parse_json(content), content)
    except CheckpointCorruptError as error:
        problem = str(error)
    if has_own_mark(metadata):
        found.file(SIDECAR_FILE, State.SOUND if problem is None else State.FLIPPED, f"is damaged ({problem})")
        return records
    if records is None:
        return None
    known = {record.path: record for record in records}
    lengths_are_right = all(found.sizes.get(record.path) == record.nbytes for record in records)
    if (
        METADATA_FILE in known
        and lengths_are_right
        and known[METADATA_FILE] != file_record(METADATA_FILE, metadata)
    ):
        found.file(METADATA_FILE, State.FLIPPED, f"is damaged: it is not what {SIDECAR_FILE} says")
    return None


def _problem(document: Any, content: bytes) -> str | None:
    """What shows that a sidecar that can be parsed is not as it was written; None if nothing does."""
    if document["version"] != _VERSION:
        return f"it is of version {document['version']}, which was never written"
    if json.dumps(document, indent=1).encode() != content:
        return "it is not written as ckpt_fast has written it"
    crcs = [entry["crc32"] for entry in document["files"].values()]
    return None if all(f"{int(crc, 16):08x}" == crc for crc in crcs) else "a checksum is no such number"
