# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that is loaded: opened once by every rank, examined by rank 0, and the same for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ckpt_fast.doors.megatron.common_state import has_seal, open_checkpoint, read_common_state
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.format.names import COMMON_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.jobs import trace
from ckpt_fast.pipeline.load.complete import require_complete
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.world import on_rank_0
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.trainer.contents.data_position import FILES_KEY, files_of, places_of, require_files
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.load.run import LoadRun
from ckpt_fast.trainer.load.visibility import view_of, wait_for_view
from ckpt_fast.trainer.places.catalog import Found
from ckpt_fast.trainer.places.locate import _NON_PERSISTENT_CKPT_SUBDIR, format_of
from ckpt_fast.trainer.places.paths import (
    CONFIG_FILE,
    TRAIN_STATE_FILE,
    file_exists,
    get_checkpoint_name,
    join_paths,
    settled,
)

T = TypeVar("T")
D = TypeVar("D")

_DATALOADER_STATE_SUBDIR = "energon"


@dataclass(frozen=True)
class Located:
    """The checkpoint being loaded, as known before anything is requested from it.

    Attributes:
        found: which one.
        kind: what reads it.
        checkpoint: open on this rank; None for a local one, which its manager reads.
        common: its common state; empty where the payload brings all. The load merges the payload into it.
        position: directory of the data loader's states that belong to it, or None.
    """

    found: Found
    kind: CheckpointType
    checkpoint: OpenCheckpoint | None = None
    common: dict[str, Any] = field(default_factory=dict)
    position: str | None = None

    @property
    def name(self) -> Any:
        """Its directory; of a local one the iteration."""
        return self.found.path or self.found.iteration

    @property
    def opened(self) -> OpenCheckpoint:
        """``checkpoint``, of one that is not local."""
        assert self.checkpoint is not None
        return self.checkpoint


class _Facts(NamedTuple):
    """The findings of rank 0: the kind of checkpoint, and which data loader state it vouches for."""

    kind: CheckpointType
    position: str | None
    files: list[FileRecord]


@contextlib.contextmanager
def locate(run: LoadRun, load_dir: str | None, found: Found) -> Iterator[Located]:
    """One checkpoint, sound as far as names, lengths and small files say, until the block ends. Collective.

    Where the data loader's state is, and which files the checkpoint vouches for, is left in the context.

    Args:
        run: the load.
        load_dir: the root, or the checkpoint, that was asked for.
        found: the checkpoint.

    Raises:
        CheckpointError: on every rank: it is damaged, or not all ranks see it.
        AssertionError: it is of another format than configured.
        NotImplementedError: it is of no known format, or Hugging Face weights.
    """
    if not found.path:
        position = on_rank_0(lambda: _find_data_position(found, load_dir, run.ckpt_cfg))
        record_data_position(run.context, position)
        yield Located(found, CheckpointType.LOCAL, position=position)
        return

    def examine(checkpoint: OpenCheckpoint) -> _Facts:
        position = _find_data_position(found, load_dir, run.ckpt_cfg)
        files = files_of(checkpoint)
        if not run.ckpt_cfg.finetune:
            require_files(position, files)
        return _Facts(_require_sound(checkpoint, run.ckpt_cfg.ckpt_format), position, files)

    def decode(checkpoint: OpenCheckpoint, facts: _Facts) -> dict[str, Any]:
        return read_common_state(checkpoint) if facts.kind is CheckpointType.GLOBAL else {}

    with _opened_by_all(found.path, examine, decode) as (checkpoint, facts, common):
        record_data_position(run.context, facts.position)
        record_data_files(run.context, facts.files)
        yield Located(found, facts.kind, checkpoint, common, facts.position)


@contextlib.contextmanager
def opened_torch_dist(path: str) -> Iterator[tuple[OpenCheckpoint, dict[str, Any]]]:
    """A torch_dist checkpoint, open on every rank until the block ends, and its common state. Collective.

    Raises:
        CheckpointError: on every rank: it is damaged on one, or one does not see what rank 0 sees.
    """
    with _opened_by_all(path, lambda _: None, lambda opened, _: read_common_state(opened)) as (
        opened,
        _,
        common,
    ):
        yield opened, common


@contextlib.contextmanager
def _opened_by_all(
    path: str, examine: Callable[[OpenCheckpoint], T], decode: Callable[[OpenCheckpoint, T], D]
) -> Iterator[tuple[OpenCheckpoint, T, D]]:
    """The checkpoint at ``path``, open on every rank until the block ends, and the same for all. Collective.

    Args:
        path: of the checkpoint.
        examine: what rank 0 finds out for all, the first to look.
        decode: what every rank needs of the checkpoint, given that.

    Raises:
        Exception: on every rank, what ``examine`` raised on rank 0.
        CheckpointError: on every rank: ``decode`` failed on one, or one does not see what rank 0 sees.
    """
    with open_checkpoint(path, (CONFIG_FILE, TRAIN_STATE_FILE)) as checkpoint:
        group, handed = ControlGroup(), b""

        def look() -> tuple[int, Any, T]:
            nonlocal handed
            with checkpoint.named():
                # Without a seal it is one of torch DCP, whose planner wants the pickle on every rank.
                if group.size > 1 and has_seal(checkpoint):
                    handed = checkpoint.to_hand_over()
                return len(handed), view_of(checkpoint), examine(checkpoint)

        with trace.span("locate", directory=path):
            nbytes, view, facts = on_rank_0(look)
            handed = group.broadcast_bytes(handed, nbytes)
        if not group.is_coordinator:
            checkpoint.accept(handed)

        def follow() -> D:
            with checkpoint.named():
                wait_for_view(checkpoint, view)
                return decode(checkpoint, facts)

        yield checkpoint, facts, group.agree(follow)


def _require_sound(checkpoint: OpenCheckpoint, configured: str) -> CheckpointType:
    """The kind of the checkpoint, whose files are all there."""
    path = checkpoint.name
    in_storage = object_storage(path) is not None
    if not in_storage and not os.path.isdir(path):
        raise CheckpointNotFoundError(
            f"the tracker names {path}, which does not exist. Was it deleted or moved? Set ckpt_step to an "
            "iteration that is there."
        )
    found = format_of(path, has_seal(checkpoint))
    if found == "fsdp_dtensor" and file_exists(join_paths(path, COMMON_FILE)):
        raise CheckpointCorruptError(
            f"{path} is a torch_dist checkpoint that lacks its metadata.json: the save was interrupted, or "
            "the file was deleted. Load an earlier iteration."
        )
    if found == "hf":
        raise NotImplementedError(
            f"Checkpoint format hf not supported: {path} holds Hugging Face weights and no training state. "
            "Give the directory as checkpoint.pretrained_checkpoint to start from them."
        )
    if found != configured:
        raise AssertionError(
            f"{path} is a {found} checkpoint, but checkpoint.ckpt_format is {configured}; set it to {found!r}"
        )
    if found == "torch_dist" or not in_storage:
        require_complete(checkpoint)
    return CheckpointType.GLOBAL if found == "torch_dist" else CheckpointType.FSDP_DTENSOR


# --- The position in the data ----------------------------------------------------------------------------


def record_data_position(context: dict[str, Any] | None, directory: str | None) -> None:
    """Leave in the context where the data loader's state of the loaded checkpoint is."""
    if context is not None:
        context["dataloader_state_dir"] = directory


def record_data_files(context: dict[str, Any] | None, files: Iterable[FileRecord]) -> None:
    """Leave in the context which files of the data loader the loaded checkpoint vouches for."""
    if context is not None:
        context[FILES_KEY] = list(files)


def _find_data_position(found: Found, load_dir: str | None, ckpt_cfg: Any) -> str | None:
    """The directory of the data loader's states that belong to a checkpoint. Local.

    It is beside the iterations of the run that saved it, and one directory higher for the recovery
    checkpoints in its ``non_persistent``. Of several places the one that has this iteration is taken, or the
    first.
    """
    root = os.path.dirname(settled(found.path)) if found.path else ""
    places = [root] if root else [ckpt_cfg.save, load_dir]
    if os.path.basename(root) == _NON_PERSISTENT_CKPT_SUBDIR:
        places.insert(0, os.path.dirname(root))
    if root and root == ckpt_cfg.non_persistent_global_ckpt_dir:
        places.insert(0, ckpt_cfg.save)
    states = [join_paths(place, _DATALOADER_STATE_SUBDIR) for place in places if place]
    for directory in states:
        if found.iteration >= 0 and places_of(get_checkpoint_name(directory, found.iteration)):
            return directory
    return states[0] if states else None
