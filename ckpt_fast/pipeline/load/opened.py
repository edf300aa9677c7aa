# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is open for reading: what its small files say, from one reading of each."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import cached_property
from types import TracebackType

from ckpt_fast.errors import CheckpointCorruptError, CheckpointError
from ckpt_fast.format.manifest import (
    FOOTER_NBYTES,
    Manifest,
    manifest_in,
    mark_of,
    without_pickle,
)
from ckpt_fast.format.names import METADATA_FILE, SIDECAR_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.load.decode import (
    Contents,
    Sections,
    cut_metadata,
    has_own_mark,
    is_own,
    missing_metadata,
    parse_contents,
    read_sidecar,
)
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.storage.files import Files
from ckpt_fast.storage.small_files import LARGEST_FILE, ends_so
from ckpt_fast.storage.versions import FileVersions


class OpenCheckpoint:
    """One checkpoint as this process sees it while it is loaded. As a context it is closed at the end.

    What was compared with a checksum is what is decoded: nobody opens the file again.

    Args:
        files: the checkpoint; closed with this.
        wanted: small files that will be decoded; whoever reads one first reads it for all. Of other files
            nothing is kept.

    Attributes:
        files: as given.
        wanted: as given, with ``.metadata``.
    """

    def __init__(self, files: Files, wanted: Collection[str] = ()) -> None:
        self.files = files
        self.wanted = frozenset((*wanted, METADATA_FILE))
        self._kept: dict[str, bytes] = {}
        self._handed = b""
        self._is_seen: bool | None = None
        self._is_own: bool | None = None
        self._has_sidecar = False

    @property
    def name(self) -> str:
        """The checkpoint's name in messages."""
        return self.files.name

    @property
    def directory(self) -> str:
        """The place its files are read from."""
        return self.files.directory

    def read(self, name: str, limit: int = LARGEST_FILE) -> bytes:
        """The content of a small file as of its first read; errors as of ``read_small_file``."""
        if name in self._kept:
            return self._kept[name]
        if name != METADATA_FILE:
            content = self.files.read(name, limit)
        else:
            self.versions.note([name])
            content = self.files.read(name, limit)
            self._is_own = is_own(content)
        if name in self.wanted:
            self._kept[name] = content
        return content

    def share(self, group: ControlGroup) -> None:
        """Collective. Let the coordinator read ``.metadata`` for all ranks, before anything else is asked."""
        if group.size > 1:
            self.accept(group.broadcast_bytes(self.to_hand_over() if group.is_coordinator else b""))

    def to_hand_over(self) -> bytes:
        """Local. What other ranks need of ``.metadata``, before anything else is asked; empty if nothing.

        Not the pickle: a load of ours reads the table. Whatever is wrong with the file, each rank finds out.
        """
        if "://" in self.name:
            return b""
        try:
            return without_pickle(self.read(METADATA_FILE))
        except (OSError, ValueError, CheckpointError):
            return b""

    def accept(self, handed: bytes) -> None:
        """Local. Use what the coordinator has read, as long as this rank sees the same file.

        Args:
            handed: by ``to_hand_over`` of the coordinator.
        """
        self._handed = handed if METADATA_FILE not in self._kept else b""

    def seen_by_all(self) -> tuple[int, int] | None:
        """Local. CRC-32 and length of ``.metadata`` if this rank sees the one that was handed over.

        The last bytes of the file have the CRC-32 of all others, which so need not be read.
        """
        if not self._handed:
            return None
        mark = mark_of(self._handed)
        if self._is_seen is None:
            self.versions.note([METADATA_FILE])
            path = os.path.join(self.directory, METADATA_FILE)
            self._is_seen = ends_so(path, mark[1], self._handed[-FOOTER_NBYTES:])
        return mark if self._is_seen else None

    def take(self, name: str) -> bytes:
        """``read`` for the last time: the file's content is not kept any longer."""
        content = self.read(name)
        self._kept.pop(name, None)
        return content

    def holds(self, name: str) -> bool:
        """Whether there is a small file of this name; if it cannot be read, whoever reads it says so."""
        try:
            self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, CheckpointCorruptError):
            return True
        return True

    def forget(self) -> None:
        """Check the files again: they may have been replaced. Not once ``.metadata`` is taken apart."""
        self._kept.clear()
        self._is_seen = None
        self.__dict__.pop("versions", None)

    @cached_property
    def versions(self) -> FileVersions:
        """The version of ``.metadata`` just before it was read; data files follow."""
        return FileVersions(self.directory)

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the save; errors as of ``read_contents``."""
        return self._sections.manifest

    @property
    def is_own(self) -> bool:
        """Whether ckpt_fast, of whatever version, wrote the ``.metadata``."""
        if self._is_own is None and self.seen_by_all():
            self._is_own = True
        if self._is_own is None:
            try:
                self.read(METADATA_FILE)
            except (OSError, CheckpointCorruptError):
                return False
        return bool(self._is_own)

    @cached_property
    def contents(self) -> Contents:
        """The contents of ``.metadata``; errors as of ``read_contents``."""
        contents = parse_contents(self._sections, os.path.join(self.directory, METADATA_FILE))
        self._sections = self._sections._replace(pickled=b"")  # the contents let go of it once it is parsed
        return contents

    @cached_property
    def index(self) -> CheckpointIndex:
        """The table of contents; errors as of ``CheckpointIndex``."""
        return CheckpointIndex(self.directory, self.contents, files=self.files, versions=self.versions)

    @cached_property
    def _sections(self) -> Sections:
        if self.seen_by_all():
            manifest, self._handed = manifest_in(self._handed), b""
            return Sections(None, manifest, manifest.save_id)
        try:
            content = self.take(METADATA_FILE)
        except FileNotFoundError as error:
            raise missing_metadata(self.directory) from error
        self._has_sidecar = has_own_mark(content)
        if self._has_sidecar:
            self.files.fetch([SIDECAR_FILE])
        return cut_metadata(content, self.directory)

    def records(self) -> list[FileRecord] | None:
        """The files that the manifest, or the sidecar of an older checkpoint, names; None without either.

        A sidecar counts unless the files it speaks of have been replaced by another library's.
        """
        if self.manifest is not None:
            return list(self.manifest.files.values())
        return read_sidecar(self.directory) if self._has_sidecar else None

    def named(self) -> AbstractContextManager[None]:
        """A block whose errors name the checkpoint, wherever its files are read."""
        return self.files.named()

    def close(self) -> None:
        """Nothing is asked any more. May be called again."""
        self._let_go()
        self.files.close()

    def _let_go(self) -> None:
        self._kept.clear()
        for name in ("_sections", "contents", "index"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()
        self.files.__exit__(kind, error, trace)
