# SPDX-License-Identifier: Apache-2.0
"""What a verification has found so far of the files and items of one checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from ckpt_fast.format.types import Extent
from ckpt_fast.storage.files import Directory, Files
from ckpt_fast.verification.report import FileReport, ItemReport, State

# Of two findings about one file, the later in this list stays.
_ORDER = (State.EXTRA, State.UNREAD, State.SOUND, State.UNDECODED, State.UNCHECKED)


class Findings:
    """Collects the findings. Of several about one file the gravest stays, of equally grave ones the first.

    Args:
        sizes: length of each file that is there, by its name in the checkpoint.
        files: where they are.
        deep: whether every byte is to be read.
    """

    def __init__(self, sizes: Mapping[str, int], files: Files, deep: bool) -> None:
        self.sizes, self.files, self.deep = sizes, files, deep
        self.items: list[ItemReport] = []
        self.notes: list[str] = []
        self._files: dict[str, FileReport] = {}

    def file(self, path: str, state: State, detail: str = "") -> None:
        """A finding about a file."""
        known = self._files.get(path)
        if known is None or _gravity(state) > _gravity(known.state):
            self._files[path] = FileReport(path, state, self.sizes.get(path), detail)

    def item(
        self, name: str, offsets: tuple[int, ...] | None, extent: Extent, state: State, detail: str = ""
    ) -> None:
        """A finding about a piece of a tensor, or an object."""
        self.items.append(ItemReport(name, offsets, state, *extent, detail))

    def state_of(self, path: str) -> State | None:
        """What is known of a file so far."""
        known = self._files.get(path)
        return known.state if known is not None else None

    def reports(self) -> tuple[FileReport, ...]:
        """The findings about files, by their names."""
        return tuple(self._files[path] for path in sorted(self._files))

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing or cut short."""
        lacking = (State.MISSING, State.TRUNCATED)
        states = [each.state for each in self._files.values()] + [each.state for each in self.items]
        return not any(state in lacking for state in states)

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None, with a finding, if it cannot be read."""
        try:
            return self.files.read(name)
        except FileNotFoundError:
            self.file(name, State.MISSING, "is missing")
        except OSError as error:
            self.file(name, State.UNCHECKED, f"cannot be read ({error.strerror or error})")
        except ValueError as error:
            self.file(name, State.FLIPPED, f"is damaged ({error})")
        return None

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[str]:
        """The local path of a file. What came from object storage is removed at the end, for the next one."""
        self.files.fetch([name])
        path = os.path.join(self.files.directory, name)
        try:
            yield path
        finally:
            if not isinstance(self.files, Directory):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


def _gravity(state: State) -> int:
    return len(_ORDER) if state.is_damage else _ORDER.index(state)


def length_finding(nbytes: int | None, wanted: int, by: str = "") -> tuple[State, str] | None:
    """What the length of a file says; None if it is right.

    Args:
        nbytes: its length; None if it is missing.
        wanted: its length when it was written.
        by: who says so, for the detail.
    """
    if nbytes is None:
        return State.MISSING, "is missing"
    if nbytes == wanted:
        return None
    state = State.TRUNCATED if nbytes < wanted else State.SWAPPED
    return state, f"has {nbytes} bytes instead of {wanted}{by}"
