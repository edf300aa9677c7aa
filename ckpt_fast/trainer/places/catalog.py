# SPDX-License-Identifier: Apache-2.0
"""The catalog of checkpoints to resume from: persistent, recovery and local, in one list.

Loading, falling back and retention ask here, and nowhere else, which checkpoints exist, which of them were
published, and whether one is whole. Links to directories are followed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckpt_fast.doors.megatron.common_state import (
    is_sealed,
    load_common_state_dict,
    open_checkpoint,
)
from ckpt_fast.errors import CheckpointError, DamagedFileError, StorageError
from ckpt_fast.format.names import COMMON_FILE, METADATA_FILE
from ckpt_fast.pipeline.load.complete import require_complete
from ckpt_fast.ranks.world import on_rank_0
from ckpt_fast.retention.line import Noted, newest_of, noted_in
from ckpt_fast.retention.stored import head_at
from ckpt_fast.storage import replacement
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.trainer.contents.megatron_lm import ARGUMENTS
from ckpt_fast.trainer.places.paths import (
    TRACKER_PREFIX,
    file_exists,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    get_checkpoint_train_state_filename,
    is_directory,
    iteration_of,
    join_paths,
    names_in,
)
from ckpt_fast.trainer.places.trackers import parse_tracker, read_train_state

Tier = Literal["persistent", "recovery", "local"]

NOTHING = -1

# Of equally new checkpoints the one that is nearer to the ranks is taken.
ORDER: dict[Tier, int] = {"local": 2, "recovery": 1, "persistent": 0}


@dataclass(frozen=True)
class Found:
    """One checkpoint.

    Attributes:
        tier: what it was saved for.
        root: the directory of such checkpoints; "" where it was named by itself or is local.
        iteration: -1 where nothing but its files say.
        path: its own directory; "" for a local one, whose parts lie on many nodes.
        is_release: the root's ``release``.
        is_published: whether its save came to an end, as far as the root's trackers say.
    """

    tier: Tier
    root: str
    iteration: int
    path: str
    is_release: bool = False
    is_published: bool = True

    def __str__(self) -> str:
        return self.path or f"the local checkpoint of iteration {self.iteration}"


@dataclass(frozen=True)
class Published:
    """Which iteration of a root is the one to resume from.

    Attributes:
        iteration: -1 for none, 0 for a release.
        is_release: it is the root's ``release``.
        notes: what was wrong with the trackers, and what was taken instead; for the log.
    """

    iteration: int = NOTHING
    is_release: bool = False
    notes: tuple[str, ...] = ()


def list_checkpoints(
    roots: Mapping[str, Tier], context: dict[str, Any] | None = None, format_wanted: str | None = None
) -> list[Found]:
    """Every checkpoint in ``roots`` and, with a local manager in the context, on the nodes. Collective.

    Args:
        roots: directory to the tier that it holds.
        context: holds the local checkpoint manager, which has been asked for its newest.
        format_wanted: leave out what is not sealed as a checkpoint of this format.

    Returns:
        Newest first; of equally new ones a local, then a recovery checkpoint comes first.
    """
    manager = (context or {}).get("local_checkpoint_manager")
    found = [Found("local", "", iteration, "") for iteration in getattr(manager, "iterations", list)()]

    def look() -> list[Found]:
        entries = [entry for root, tier in roots.items() for entry in checkpoints_in(root, tier)]
        return [entry for entry in entries if format_wanted in (None, seal_of(entry.path))]

    found += on_rank_0(look)
    return sorted(found, key=lambda each: (each.iteration, ORDER[each.tier]), reverse=True)


def checkpoints_in(root: str, tier: Tier = "persistent") -> list[Found]:
    """The checkpoints of one root, oldest first. Local."""
    try:
        newest = published(root)
    except DamagedFileError:
        newest = Published()
    last = NOTHING if newest.is_release else newest.iteration
    return [
        Found(tier, root, iteration, path, is_published=iteration <= last)
        for iteration, path in iterations_in(root)
    ]


def iterations_in(root: str) -> list[tuple[int, str]]:
    """(iteration, path) of every directory ``iter_*`` in ``root``, or link to one, oldest first. Local."""
    paths = ((name, join_paths(root, name)) for name in names_in(root, "iter_*"))
    found = ((iteration_of(name), path) for name, path in paths)
    return sorted((iteration, path) for iteration, path in found if iteration >= 0 and is_directory(path))


def put_back(path: str | None) -> None:
    """Local. Give a checkpoint, or those of a root, their names again, if a crash has left them without.

    That is where a file system cannot exchange two directories; see ``pipeline.replacement``. Where this user
    may not rename them they stay unseen, and an older one is found.
    """
    if not path or object_storage(path):
        return
    with contextlib.suppress(OSError):
        replacement.put_back(path)
        if is_directory(path):
            for each in replacement.replaced_in(path):
                replacement.put_back(each)


# --- Whether one is whole ---------------------------------------------------------------------------------


def seal_of(path: str) -> str | None:
    """The format that a directory is sealed as a checkpoint of; None if it is not. Local."""
    try:
        if is_sealed(path):
            return "torch_dist"
    except StorageError:
        raise
    except CheckpointError:
        return None
    is_torch_dist = file_exists(join_paths(path, COMMON_FILE))
    return "fsdp_dtensor" if file_exists(join_paths(path, METADATA_FILE)) and not is_torch_dist else None


def damage_of(path: str) -> str | None:
    """Why a directory is no whole checkpoint; None if it is one as far as names and lengths of files say.

    Local. Objects in object storage appear whole, so that the seal says enough.

    Raises:
        OSError: nobody can tell.
    """
    if not is_directory(path):
        return f"{path} does not exist"
    if seal_of(path) is None:
        return f"{path} has no seal ({METADATA_FILE}, and metadata.json if it is a torch_dist checkpoint)"
    if not file_exists(join_paths(path, METADATA_FILE)):
        return f"{path} has no {METADATA_FILE}"
    if object_storage(path):
        return None
    try:
        with open_checkpoint(path) as checkpoint:
            require_complete(checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def noted_at(path: str) -> Noted:
    """What a checkpoint notes of its place among others; nothing if it cannot be read. Local."""
    iteration = iteration_of(path)
    if not object_storage(path):
        with contextlib.suppress(OSError):
            head = head_at(path)
            return noted_in(head.notes, iteration) if head is not None else Noted(iteration)
        return Noted(iteration)
    with contextlib.suppress(CheckpointError, OSError), open_checkpoint(path) as checkpoint:
        manifest = checkpoint.manifest
        if manifest is not None:
            return noted_in(manifest.notes, iteration)
    return Noted(iteration)


def noted_by(found: Sequence[Found], context: dict[str, Any] | None = None) -> dict[Found, Noted]:
    """What each of these notes of its place among others; the same on all ranks. Collective.

    Args:
        found: of any tier.
        context: holds the local checkpoint manager, which has been asked for its newest.
    """
    manager: Any = (context or {}).get("local_checkpoint_manager")
    local = [each for each in found if each.tier == "local"]
    notes = manager.notes() if local and hasattr(manager, "notes") else {}
    noted = {each: noted_in(notes.get(each.iteration, {}), each.iteration) for each in local}
    others = [each for each in found if each.tier != "local"]
    read = on_rank_0(lambda: [noted_at(each.path)._replace(iteration=each.iteration) for each in others])
    return noted | dict(zip(others, read, strict=True))


# --- Which was published ----------------------------------------------------------------------------------


def published(root: str) -> Published:
    """The iteration to resume from: what the trackers name or, without a sound one, the newest whole. Local.

    ``latest_train_state.pt`` goes before the tracker of Megatron-LM, which a crash may leave one save behind.

    Raises:
        DamagedFileError: there are trackers, none is sound, and no iteration is whole.
        StorageError: object storage does not let anyone tell.
    """
    ours = get_checkpoint_train_state_filename(root, prefix=TRACKER_PREFIX)
    megatron_lm = get_checkpoint_tracker_filename(root)
    steps, problems = [], []
    if file_exists(ours):
        try:
            steps.append((int(read_train_state.read(ours).step), False))
        except DamagedFileError as error:
            problems.append(str(error))
    if file_exists(megatron_lm):
        iteration, problem = parse_tracker(megatron_lm)
        if isinstance(problem, StorageError):
            raise problem
        if problem is None:
            steps.append((iteration, iteration == 0))
        else:
            problems.append(str(problem))
    if steps:
        iteration, is_release = steps[0]
        notes = [f"{problem} The other tracker says {iteration}." for problem in problems]
        # Megatron-LM writes neither.
        train_state = get_checkpoint_train_state_filename(get_checkpoint_name(root, iteration, is_release))
        if not file_exists(ours) and file_exists(train_state):
            notes.append(f"{ours} is missing; {megatron_lm} says {iteration}.")
        return Published(iteration, is_release, tuple(notes))
    return _newest_whole(root, problems)


def _newest_whole(root: str, problems: list[str]) -> Published:
    found = [path for _, path in reversed(iterations_in(root))]
    # In object storage, what each notes would be a download.
    noted = (lambda path: Noted(iteration_of(path))) if object_storage(root) else noted_at
    newest = newest_of(found, noted, lambda path: damage_of(path) is None and _is_complete_run(path))
    if newest is not None:
        reasons, iteration = problems or [f"{root} has no trackers."], iteration_of(newest)
        note = f"{' '.join(reasons)} The newest whole checkpoint in it is of iteration {iteration}."
        return Published(iteration, notes=(note,))
    if problems:
        raise DamagedFileError(f"{' '.join(problems)} No iteration in {root} is whole either.")
    return Published()


def _is_complete_run(path: str) -> bool:
    """Whether the counters of the run are in it, which another library's save writes after the payload."""
    if noted_at(path).line is not None or file_exists(get_checkpoint_train_state_filename(path)):
        return True
    try:
        return ARGUMENTS in load_common_state_dict(path)
    except StorageError:
        raise
    except CheckpointError:
        return False


def why_nothing(load_dir: str | None) -> str:
    """The reason why no checkpoint was found in a directory, as a sentence. Local."""
    if not load_dir:
        return "checkpoint.load is not set"
    if not is_directory(load_dir):
        return f"{load_dir} does not exist"
    iterations = iterations_in(load_dir)
    if not iterations:
        return f"there is no checkpoint in {load_dir}"
    reason = damage_of(iterations[-1][1])
    count = f"none of the {len(iterations)} iterations" if len(iterations) > 1 else "the only iteration"
    return f"{count} in {load_dir} is {'not ' if len(iterations) == 1 else ''}whole: {reason}"
