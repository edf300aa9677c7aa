# SPDX-License-Identifier: Apache-2.0
"""``integrity.json``: a SHA-256 of each file of a checkpoint.

Megatron-Core from 0.19 on writes it with ``verify_integrity=True``.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ckpt_fast.format.documents import parse_json
from ckpt_fast.verification.content import digest_of, file_archive_problem
from ckpt_fast.verification.findings import Findings
from ckpt_fast.verification.places import INTEGRITY_FILE, is_data_file
from ckpt_fast.verification.report import State


def check_integrity(found: Findings) -> None:
    """Compare the files of a checkpoint with its ``integrity.json``, if there is one.

    Without ``found.deep`` data files are looked for, and not read.
    """
    if INTEGRITY_FILE not in found.sizes:
        return
    content = found.read(INTEGRITY_FILE)
    if content is None:
        return
    try:
        algorithm, digests = _parse(content)
    except ValueError as error:
        found.file(INTEGRITY_FILE, State.FLIPPED, f"is damaged ({error})")
        return
    found.file(INTEGRITY_FILE, State.SOUND)
    for name, wanted in digests.items():
        _check_file(found, name, algorithm, wanted)


def _check_file(found: Findings, name: str, algorithm: str, wanted: str) -> None:
    by = f"that {INTEGRITY_FILE} says"
    if name not in found.sizes:
        found.file(name, State.MISSING, f"is missing, and {INTEGRITY_FILE} names it")
        return
    if is_data_file(name) and not found.deep:
        found.file(name, State.UNREAD)
        return
    try:
        with found.fetched(name) as path:
            digest = digest_of(path, algorithm)
            is_whole = digest != wanted and not is_data_file(name) and file_archive_problem(path) is None
    except OSError as error:
        found.file(name, State.UNCHECKED, f"cannot be read ({error.strerror or error})")
        return
    if digest == wanted:
        found.file(name, State.SOUND)
        return
    state = State.SWAPPED if is_whole else State.FLIPPED
    found.file(name, state, f"has the {algorithm} {digest[:16]}... instead of the {wanted[:16]}... {by}")


def _parse(content: bytes) -> tuple[str, dict[str, str]]:
    """The algorithm, and the digest of each file.

    Raises:
        ValueError: it is not as Megatron-Core writes it.
    """
    document: Any = parse_json(content)
    if not isinstance(document, dict) or not isinstance(document.get("files"), dict):
        raise ValueError("it names no files")
    algorithm = document.get("algorithm")
    if not isinstance(algorithm, str) or algorithm not in hashlib.algorithms_guaranteed:
        raise ValueError(f"it names the algorithm {algorithm!r}, which is none")
    if json.dumps(document, indent=2).encode() != content:
        raise ValueError("it is not written as Megatron-Core writes it")
    digests = document["files"]
    length = 2 * hashlib.new(algorithm).digest_size
    if not length:
        raise ValueError(f"the digests of {algorithm} have no length")
    for name, digest in digests.items():
        if not isinstance(digest, str) or len(digest) != length or "/" in name:
            raise ValueError(f"what it says of {name!r} is no digest")
    return algorithm, digests
