# SPDX-License-Identifier: Apache-2.0
"""The directory of a manager's checkpoints: their names, the tracker, and which one is selected. Local.

It looks like that of a run of Megatron-LM, so that ``ckpt-fast`` and retention know it: ``iter_0000100`` and
``latest_checkpointed_iteration.txt``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Sequence

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ckpt_fast.retention.choice import choose
from ckpt_fast.retention.line import Origin, line_in, newest_of
from ckpt_fast.retention.policies import Policy
from ckpt_fast.retention.removal import remove_directory
from ckpt_fast.retention.stored import Stored, head_at, unchanged_s
from ckpt_fast.storage import replacement
from ckpt_fast.storage.commit import invalidate, seals_among, write_file_atomic
from ckpt_fast.storage.small_files import LARGEST_TEXT, read_small_file
from ckpt_fast.storage.sole_writer import note_written, warn_of_another

logger = logging.getLogger(__name__)

_TRACKER = "latest_checkpointed_iteration.txt"
# A save that has written nothing for so long is dead.
_DEAD_S = 3600.0
_NAME = re.compile(r"iter_([0-9]+)")


class CheckpointDirectory:
    """The checkpoints of a directory, and the tracker that names the one to resume from.

    Args:
        root: the directory; need not exist.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, step: int) -> str:
        """The directory of a step's checkpoint."""
        return os.path.join(self.root, f"iter_{step:07d}")

    def found(self) -> list[Stored]:
        """All that are there, whole or not, oldest first; also links to checkpoints elsewhere."""
        with contextlib.suppress(FileNotFoundError):
            matches = filter(None, map(_NAME.fullmatch, os.listdir(self.root)))
            stored = [Stored(int(match[1]), os.path.join(self.root, match[0])) for match in matches]
            return sorted(
                (each for each in stored if os.path.isdir(each.path)), key=lambda each: each.iteration
            )
        return []

    def selected(self) -> int | None:
        """The step to resume from: what the tracker names or, without a sound one, the newest whole one."""
        try:
            text = read_small_file(os.path.join(self.root, _TRACKER), LARGEST_TEXT).decode(errors="replace")
            if re.fullmatch(r"[0-9]{1,18}", text.strip()):
                return int(text)
            problem = f"holds no step: {text[:80]!r}"
        except FileNotFoundError:
            problem = ""
        except CheckpointCorruptError as error:
            problem = f"cannot be read ({error})"
        except OSError as error:
            raise CheckpointError(
                f"{_TRACKER} in {self.root} cannot be read ({error}), so nobody can tell which checkpoint is "
                "the newest. Remove the cause and try again."
            ) from error
        found = newest_of(reversed(self.found()), lambda each: each.noted, lambda each: each.is_whole)
        newest = found.iteration if found is not None else None
        if problem:
            logger.warning("%s in %s %s; the newest whole step is %s", _TRACKER, self.root, problem, newest)
        return newest

    def to_restore(self, step: int | None) -> list[Origin]:
        """The checkpoints to try, in order: that of ``step``, or the selected one and those it came from.

        Raises:
            CheckpointNotFoundError: there is no directory of this step.
        """
        if os.path.isdir(self.root):
            for path in replacement.replaced_in(self.root):
                with contextlib.suppress(OSError):
                    replacement.put_back(path)
        wanted = self.selected() if step is None else step
        if wanted is None:
            if any(each.is_sealed for each in self.found()):
                raise CheckpointCorruptError(
                    f"none of the checkpoints in {self.root} is whole: look at them with ckpt-fast verify. "
                    "To begin anew, use another directory."
                )
            return []
        if step is not None:
            if not os.path.isdir(self.path(step)):
                there = ", ".join(str(each.iteration) for each in self.found()) or "none"
                raise CheckpointNotFoundError(
                    f"{self.path(step)} does not exist; steps that are there: {there}"
                )
            return [self._origin(step)]
        first = self._origin(wanted)
        older = [each for each in reversed(self.found()) if each.iteration < wanted and each.is_sealed]
        left = [
            each
            for each in older
            if first.line is not None and first.line.has_left(wanted, each.iteration, each.line)
        ]
        if left:
            logger.info("of an abandoned branch, and not to fall back to: %s", _steps(left))
        return [first, *(self._origin(each.iteration) for each in older if each not in left)]

    def damage(self, step: int) -> str | None:
        """Why the checkpoint of a step is not whole, as far as its small files say; None if it is."""
        try:
            return Stored(step, self.path(step)).damage
        except OSError as error:
            return f"{self.path(step)} cannot be read: {error}"

    def publish(self, step: int) -> None:
        """Let the tracker name a checkpoint, which is sealed.

        Raises:
            CheckpointWriteError: it names the one before.
        """
        tracker, content = os.path.join(self.root, _TRACKER), str(step).encode()
        warn_of_another(tracker)
        write_file_atomic(tracker, content)
        note_written(tracker, content)

    def prune(self, policies: Sequence[Policy]) -> None:
        """Delete what no policy keeps. A failure is logged: it costs disk space.

        Links are neither counted nor deleted: what they lead to is somebody's own arrangement.

        Args:
            policies: see ``choose``; none: all stay.
        """
        try:
            found = [each for each in self.found() if not os.path.islink(each.path)]
            # After what is there: a save that ends in between is at its directory still, which protects it.
            step = self.selected()
            if all(each.iteration != step for each in found):  # just published: deletions follow that
                return
            choice = choose(found, policies, step)
        except Exception:
            logger.exception("cannot tell which checkpoints in %s are old: none is deleted", self.root)
            return
        if choice.abandoned:
            logger.info("of an abandoned branch, and not counted: %s", _steps(choice.abandoned))
        for each in choice.removed:
            try:
                with each.removing() as is_same:
                    if is_same:  # the program may have gone back, and saved it again
                        remove_directory(each.path)
                        logger.debug("deleted %s", each.path)
            except OSError:
                logger.exception("cannot delete the old checkpoint %s", each.path)

    def sweep(self) -> None:
        """Remove what saves that were killed while they replaced a checkpoint have left beside it.

        Nobody can tell which of them is alive in another process. One in which nothing was written for an
        hour, or for as long as a save may take, is not. A failure is logged: it costs disk space.
        """
        dead_s = max(_DEAD_S, settings.timeout_s())
        try:
            for path in replacement.replaced_in(self.root):
                left = [each for each in replacement.left_beside(path) if unchanged_s(each) > dead_s]
                if not left or not _NAME.fullmatch(os.path.basename(path)):
                    continue
                replacement.put_back(path)
                for each in left:
                    if os.path.lexists(each):
                        replacement.discard(each, path)
                        logger.debug("removed %s, which a save that was killed has left", each)
        except OSError as error:
            logger.warning("cannot remove what killed saves have left in %s: %s", self.root, error)

    def remove_unfinished(self, step: int) -> None:
        """Remove the files that a failed save has left, where nobody writes any more; no checkpoint."""
        directory = self.path(step)
        try:
            if os.path.islink(directory) or not os.path.isdir(directory):
                return
            if not seals_among(os.listdir(directory)):
                invalidate(directory)
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        except (OSError, CheckpointError) as error:
            logger.warning("what the failed save has left in %s is not removed: %s", directory, error)

    def _origin(self, step: int) -> Origin:
        head = None
        with contextlib.suppress(OSError):
            head = head_at(self.path(step))
        return Origin(step) if head is None else Origin(step, head.save_id, line_in(head.notes))


def _steps(found: Sequence[Stored]) -> str:
    return ", ".join(each.path for each in found)
