# SPDX-License-Identifier: Apache-2.0
"""The verification of one checkpoint, whoever wrote it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence

from ckpt_fast.errors import CheckpointCorruptError, UnsafeCheckpointError
from ckpt_fast.format.names import METADATA_FILE, SEAL_FILE, SIDECAR_FILE
from ckpt_fast.pipeline.load.decode import cut_metadata, has_own_mark, parse_contents
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.storage.files import Directory
from ckpt_fast.verification.beside import check_positions
from ckpt_fast.verification.content import file_archive_problem
from ckpt_fast.verification.findings import Findings
from ckpt_fast.verification.foreign import check_foreign
from ckpt_fast.verification.integrity import check_integrity
from ckpt_fast.verification.needed import COMMON_STATE_KEY, check_needed
from ckpt_fast.verification.own import check_own, disagreements
from ckpt_fast.verification.places import (
    COMMON_FILE,
    CONFIG_FILE,
    LOCAL_DIRECTORY,
    TRAIN_STATE_FILE,
    Tree,
    metadata_names,
)
from ckpt_fast.verification.report import Kind, State, VerifyReport
from ckpt_fast.verification.sidecar import sidecar_records


def verify_directory(tree: Tree, below: str, deep: bool, *, of_a_run: bool = False) -> VerifyReport:
    """Look at one checkpoint in a directory, and at what lies beside it.

    Args:
        tree: what lies below the path that was asked for.
        below: the checkpoint's name in it.
        deep: read every byte.
        of_a_run: whether the trackers say that a training run of Megatron Bridge or ckpt_fast saved it.

    Raises:
        CheckpointError, OSError: it cannot be read.
    """
    path = tree.join(below)
    with tree.files(below) as files, files.named():
        found = Findings(tree.within(below), files, deep)
        is_own, indices = False, []
        for name in metadata_names(found.sizes):
            content = found.read(name)
            index = _index_of(found, name, content) if content is not None else None
            if content is None or index is None:
                continue
            is_own |= _check(found, index, content)
            indices.append(index)
        names = {name for index in indices for name in index.names}
        kind = _kind_of(path, found, indices, names)
        if kind == "local":
            _check_name(found, indices, path)
        else:
            check_positions(found, indices, path)
            is_of_run = of_a_run or not {TRAIN_STATE_FILE, CONFIG_FILE}.isdisjoint(found.sizes)
            check_needed(found, names, is_torch_dist=kind == "torch_dist", of_a_run=is_of_run)
        check_integrity(found)
        for name in found.sizes:
            if found.state_of(name) is None:
                found.file(name, State.EXTRA)
    return VerifyReport(
        path,
        kind,
        deep,
        is_own=is_own,
        is_complete=found.is_complete,
        files=found.reports(),
        items=tuple(found.items),
        notes=tuple(found.notes),
    )


def verify_local_file(tree: Tree, below: str, deep: bool) -> VerifyReport:
    """Look at a local checkpoint of nvidia-resiliency-ext, an archive for each rank; nothing is unpickled."""
    path = tree.join(below)
    with Directory(path) as files:
        # The one file has no name of its own in the report, whose path it is.
        found = Findings({"": tree.sizes[below]}, files, deep)
        if not tree.sizes[below]:
            found.file("", State.TRUNCATED, "is empty")
        elif problem := file_archive_problem(path, deep):
            found.file("", State.FLIPPED, f"is damaged ({problem})")
        else:
            found.file("", State.SOUND if deep else State.UNREAD)
        return VerifyReport(path, "local", deep, is_complete=found.is_complete, files=found.reports())


def _index_of(found: Findings, name: str, content: bytes) -> CheckpointIndex | None:
    """The table of contents in a ``.metadata`` file; None, with a finding, if there is none."""
    if not content:
        found.file(name, State.TRUNCATED, "is empty")
        return None
    files = found.files
    if SIDECAR_FILE in found.sizes:
        files.fetch([SIDECAR_FILE])
    try:
        contents = parse_contents(
            cut_metadata(content, files.directory, name), os.path.join(files.directory, name)
        )
        index = CheckpointIndex(files.directory, contents, files=files)
    except CheckpointCorruptError as error:
        found.file(name, State.FLIPPED, f"is damaged ({error})")
        return None
    except UnsafeCheckpointError as error:
        found.file(name, State.UNCHECKED, f"cannot be read ({error})")
        return None
    found.file(name, State.SOUND)
    return index


def _check(found: Findings, index: CheckpointIndex, content: bytes) -> bool:
    """Compare with the files what a table of contents says; returns whether ckpt_fast wrote it."""
    if index.manifest is not None:
        check_own(found, index, list(index.manifest.files.values()))
        if found.deep:
            for line in _contradictions(index):
                found.file(METADATA_FILE, State.FLIPPED, f"contradicts itself: {line}")
        return True
    records = sidecar_records(found, content)
    if records is not None:
        check_own(found, index, records, f", as {SIDECAR_FILE} says")
        return True
    if has_own_mark(content):
        found.notes.append(f"{METADATA_FILE} has no manifest: another program has written it anew")
    check_foreign(found, index)
    return False


def _contradictions(index: CheckpointIndex) -> Iterator[str]:
    try:
        yield from disagreements(index)
    except CheckpointCorruptError as error:
        yield str(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield f"{type(error).__name__}: {error}"


def _kind_of(path: str, found: Findings, indices: Sequence[CheckpointIndex], names: Collection[str]) -> Kind:
    there = {*found.sizes}
    for index in indices:
        there |= index.manifest.files.keys() if index.manifest is not None else set()
    if LOCAL_DIRECTORY.fullmatch(os.path.basename(path)):
        return "local"
    if SEAL_FILE in there or COMMON_FILE in there or COMMON_STATE_KEY in names:
        return "torch_dist"
    if TRAIN_STATE_FILE in there or CONFIG_FILE in there:
        return "fsdp_dtensor"
    return "torch_dcp" if indices else "unknown"


def _check_name(found: Findings, indices: Sequence[CheckpointIndex], path: str) -> None:
    """The name of a local checkpoint says whose state it is, and so does its manifest."""
    name = LOCAL_DIRECTORY.fullmatch(os.path.basename(path))
    for index in indices:
        notes = index.manifest.notes if index.manifest is not None else {}
        if name is None or "rank" not in notes:
            continue
        if (notes.get("iteration"), notes["rank"]) != (int(name["iteration"]), int(name["rank"])):
            whose = f"rank {notes['rank']} at iteration {notes.get('iteration')}"
            found.file(METADATA_FILE, State.SWAPPED, f"is of {whose}: the checkpoint was copied or renamed")
