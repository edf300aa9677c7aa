# SPDX-License-Identifier: Apache-2.0
"""Verify: is what is stored what was written?"""

from __future__ import annotations

import os

from ckpt_fast.errors import CheckpointError, CheckpointNotFoundError
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.settings import Settings
from ckpt_fast.verification.checkpoint import verify_directory, verify_local_file
from ckpt_fast.verification.places import LOCAL_FILE, Tree, is_checkpoint
from ckpt_fast.verification.report import VerifyReport
from ckpt_fast.verification.run import verify_run


def verify(path: str | os.PathLike[str], deep: bool = False) -> VerifyReport:
    """Compare a checkpoint, or every checkpoint of a run, with what was written. Local.

    Checkpoints of ckpt_fast have a checksum of every file. Of those of other libraries (Megatron-Core,
    Megatron Bridge, torch DCP, nvidia-resiliency-ext) the structure is checked, the coverage of every
    tensor, the checksums in the archives of tensors and objects, and Megatron-Core's ``integrity.json`` if
    there is one. Nothing is loaded, and no code that a pickle names is run, whatever
    ``CKPT_FAST_ALLOW_PICKLE`` says.

    Args:
        path: a checkpoint, the directory of a run, a local checkpoint, or an ``msc://`` URL of one of them.
        deep: read every byte. Otherwise lengths, structure, ``.metadata`` and small files are looked at.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        CheckpointError: it cannot be read, which says nothing about it.
    """
    try:
        with Settings.refusing_pickle():
            return _verify(Tree(path), deep)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        name = os.fspath(path)
        raise CheckpointError(
            f"{name} cannot be read ({error.strerror or error}), which says nothing about it"
        ) from error


def _verify(tree: Tree, deep: bool) -> VerifyReport:
    if "" in tree.sizes:
        if LOCAL_FILE.fullmatch(os.path.basename(tree.path)):
            return verify_local_file(tree, "", deep)
        raise CheckpointNotFoundError(
            f"{tree.path} is no directory; a checkpoint is a directory with {METADATA_FILE}"
        )
    if is_checkpoint(name for name in tree.sizes if "/" not in name):
        return verify_directory(tree, "", deep)
    report = verify_run(tree, deep)
    if report is None:
        raise CheckpointNotFoundError(
            f"{tree.path} is no checkpoint, and there is none in it: that is a directory with {METADATA_FILE}"
        )
    return report
