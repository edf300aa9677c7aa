# SPDX-License-Identifier: Apache-2.0
"""A spool: checkpoints on storage that takes and gives whole files only, as object storage does.

The engine writes and reads local files as ever, in a directory of this rank that lives as long as the save or
load. What it has written is uploaded from there, and what it is to read is fetched.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, TypeVar

from ckpt_fast import native, settings, system
from ckpt_fast.errors import CheckpointError, CheckpointWriteError, StorageError
from ckpt_fast.format.types import FileRecord
from ckpt_fast.jobs import finalizer, trace
from ckpt_fast.storage import commit
from ckpt_fast.storage.files import Claim
from ckpt_fast.storage.patience import Judge, PlainJudge, insist
from ckpt_fast.storage.small_files import LARGEST_FILE, read_small_file
from ckpt_fast.storage.space import OVERHEAD
from ckpt_fast.storage.spool_directory import SpoolDirectory

T = TypeVar("T")


class Remote(Protocol):
    """Storage of whole files, below one checkpoint. Its own errors may be of any kind."""

    def put(self, name: str, path: str) -> None:
        """Create or replace a file by the local file ``path``."""

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file."""

    def get(self, name: str, path: str) -> None:
        """Copy a file to the local ``path``; FileNotFoundError if there is none."""

    def delete(self, name: str) -> None:
        """Remove a file; nothing if there is none."""

    def sizes(self) -> dict[str, int]:
        """Name to length of every file of the checkpoint."""


class Spool:
    """``Files`` of a checkpoint in remote storage.

    As a context it is closed at the end, and errors name the checkpoint, not the spool.

    Args:
        name: what the checkpoint is called in messages.
        remote: where it is.
        judge: of the remote storage's errors; requests are tried again while they may pass.
    """

    durable = False

    def __init__(self, name: str, remote: Remote, judge: Judge | None = None) -> None:
        self.name = name
        self._remote = remote
        self._judge = judge if judge is not None else PlainJudge()
        # Of the save: when it counts as failed, and what stops it.
        self._deadline: float | None = None
        self._progress: native.Progress | None = None
        self._directory: str | None = None
        self._remover: weakref.finalize[..., Spool] | None = None

    @property
    def directory(self) -> str:
        """The spool, created when first asked for.

        Raises:
            CheckpointWriteError: it cannot be created.
        """
        if self._directory is None:
            parent = _parent()
            own = SpoolDirectory(parent)
            # Before it is there: a signal may come at any time. And also when nobody closes it: an abandoned
            # save ends with the process.
            self._remover = weakref.finalize(self, own.remove)
            try:
                self._directory = own.create()
            except OSError as error:
                self.close()
                raise self._not_made(error) from error
        return self._directory

    def claim(self, nbytes: int) -> Claim:
        """Create the spool; what this rank will write there. From here on, time runs for the save."""
        self._deadline = time.monotonic() + settings.timeout_s()
        return _claim_in(self.directory)._replace(nbytes=nbytes)

    def room(self) -> Claim:
        """Where this rank's spool is going to be, as a claim of nothing; creates none.

        Raises:
            CheckpointWriteError: it cannot be created.
        """
        try:
            return _claim_in(_parent())
        except OSError as error:
            raise self._not_made(error) from error

    def prepare(self, claims: Sequence[Claim], *, replace: bool) -> None:
        """``require_space``; then invalidate.

        An older checkpoint cannot be kept until it is replaced: objects have no common name.

        Raises:
            CheckpointWriteError: there is no room, or the older checkpoint cannot be removed.
        """
        self.require_space(claims)
        self.invalidate()

    def require_space(self, claims: Sequence[Claim]) -> None:
        """Look whether every spool has room for the ranks that share its file system.

        Args:
            claims: of all ranks that save together.

        Raises:
            CheckpointWriteError: errno ENOSPC, with both sizes.
        """
        if not settings.space_check():
            return
        wanted: dict[str, int] = defaultdict(int)
        for claim in claims:
            wanted[claim.file_system] += int(claim.nbytes * OVERHEAD)
        for claim in claims:
            needed = wanted[claim.file_system]
            if claim.free is not None and claim.free < needed:
                raise CheckpointWriteError(
                    f"cannot save to {self.name}: what passes through the spool on "
                    f"{claim.file_system.partition(' ')[0]} is about {needed / 1e9:.2f} GB, but its file "
                    f"system has {claim.free / 1e9:.2f} GB free. Nothing was written and no checkpoint was "
                    "touched. Let CKPT_FAST_SPOOL name a larger one; CKPT_FAST_SPACE_CHECK=0 tries "
                    "regardless.",
                    errno.ENOSPC,
                    self.name,
                )

    def names(self) -> list[str]:
        """Of the files that are there, without those in folders; for a save that is about to begin.

        Raises:
            CheckpointWriteError: they cannot be listed.
        """
        with self._failures("list", "Nothing was saved"):
            # All ranks wait meanwhile, in a collective.
            until = time.monotonic() + settings.outage_s()
            found = self._insist("list", self._remote.sizes, until=until)
        return [name for name in found if "/" not in name]

    def invalidate(self, rank: int | None = None) -> None:
        """Remove an earlier checkpoint's payload, its seal first; see ``commit.invalidate``.

        Args:
            rank: given by a rank that saves without the others; of the data files it removes just its own.

        Raises:
            CheckpointWriteError: it cannot be removed.
        """
        until = time.monotonic() + settings.outage_s()
        names = self.names()
        payload = [name for name in names if commit.is_payload_of(name, rank)]
        self.delete((*commit.seals_among(names, rank), *payload), until)

    def sync_names(self) -> None:
        """Nothing: there are no directories."""

    def write_to(self, place: str) -> None:
        """Never asked."""

    def take_place(self) -> None:
        """Nothing: they are in their place."""

    def withdraw(self) -> None:
        """Nothing: what was uploaded is no checkpoint."""

    def hand_over(self, files: Sequence[FileRecord], go_on: Callable[[], bool]) -> None:
        """Upload what the engine has written, and make room for the next. A file that is under way arrives.

        An upload is tried again while its error may pass, until the save counts as failed.

        Raises:
            CheckpointWriteError: naming the file and the cause; ECANCELED if ``go_on`` said no.
        """
        for file in files:
            self._require(go_on)
            path, put = os.path.join(self.directory, file.path), self._remote.put
            request = functools.partial(put, file.path, path)
            try:
                what = f"upload {file.path} to"
                with self._failures(what), trace.span("upload", file=file.path, nbytes=file.nbytes):
                    self._insist(what, request, go_on)
            except CheckpointWriteError:
                self._require(go_on)
                raise
            os.unlink(path)

    def write_in_order(
        self,
        files: Mapping[str, bytes],
        progress: native.Progress | None = None,
        *,
        sync_names: bool = True,
    ) -> None:
        """Write ``files`` (name to content), one after the other.

        Raises:
            CheckpointWriteError: naming the file and the cause; ECANCELED once ``progress`` is stopped.
        """
        self._progress = progress if progress is not None else self._progress
        for name, content in files.items():
            with self._failures(f"write {name} to"):
                # Between two attempts the save can be stopped.
                request = functools.partial(self._write, name, content, progress)
                self._insist(f"write {name} to", request)

    def delete(self, names: Iterable[str], until: float | None = None) -> None:
        """Remove files from the remote storage, in this order.

        Args:
            names: of the files.
            until: by ``time.monotonic``: how long to try; None: as long as the save may take.

        Raises:
            CheckpointWriteError: naming the file and the cause.
        """
        for name in names:
            with self._failures(f"delete {name} in", "Those before it are gone"):
                self._insist(f"delete {name} in", functools.partial(self._remote.delete, name), until=until)

    def fetch(self, names: Iterable[str]) -> None:
        """Download these files, unless they are here already. Missing ones are missed by those who read them.

        Raises:
            StorageError: naming the file and the cause.
        """
        for name in names:
            path = os.path.join(self.directory, name)
            if os.path.exists(path):
                continue
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with trace.span("fetch", file=name):
                    self._insist(f"fetch {name} of", functools.partial(self._remote.get, name, path))
            except FileNotFoundError:
                continue
            except Exception as error:
                raise StorageError(
                    f"cannot fetch {name} of {self.name} to {self._place()}: {self._judge.cause_of(error)}. "
                    "That says nothing about the checkpoint: look at the storage, and at the free space "
                    "where CKPT_FAST_SPOOL is, and load again."
                ) from error

    def read(self, name: str, limit: int = LARGEST_FILE) -> bytes:
        """Download a small file, unless it is here already, and read it; errors as of ``fetch`` and
        ``read_small_file``."""
        self.fetch([name])
        return read_small_file(os.path.join(self.directory, name), limit)

    def missing(self, files: Sequence[FileRecord]) -> list[tuple[FileRecord, int | None]]:
        """The files that the remote storage does not list (None), or lists with another length (that length).

        Raises:
            StorageError: it cannot be listed.
        """
        try:
            sizes = self._insist("list", self._remote.sizes)
        except Exception as error:
            raise StorageError(
                f"cannot list {self.name}: {self._judge.cause_of(error)}. See that the storage can be "
                "reached, and that its profile may list it."
            ) from error
        return [(file, sizes.get(file.path)) for file in files if sizes.get(file.path) != file.nbytes]

    def require_kept(self, files: Sequence[FileRecord]) -> None:
        """Nothing: each look would be a request."""

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """A block whose errors name the checkpoint; the spool only if that cannot be written to."""
        try:
            yield
        except CheckpointWriteError as error:
            if self._directory is None or not (error.filename or "").startswith(self._directory):
                raise
            cause = os.strerror(error.errno) if error.errno else str(error).replace(self._directory, "it")
            raise CheckpointWriteError(
                f"cannot save to {self.name}: {self._place()}, which its files pass through, cannot be "
                f"written to: {cause}. The checkpoint was not published; those under other names are "
                "untouched. Free space there, or let CKPT_FAST_SPOOL name another; then save again.",
                error.errno,
                self.name,
            ) from error
        except CheckpointError as error:
            self._name_in(error)
            raise

    def close(self) -> None:
        """Remove the spool."""
        if self._remover is not None:
            finalizer.run(self._remover)
        self._directory = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, CheckpointError):
            self._name_in(error)
        self.close()

    def _name_in(self, error: CheckpointError) -> None:
        if self._directory is not None:
            error.args = tuple(str(part).replace(self._directory, self.name) for part in error.args)

    def _place(self) -> str:
        """Where the spool is, in messages."""
        return f"the spool in {_parent()}"

    def _not_made(self, error: OSError) -> CheckpointWriteError:
        return CheckpointWriteError(
            f"cannot create a spool for {self.name} in {_parent()}: {error.strerror}. Let CKPT_FAST_SPOOL "
            "name a local directory that can be written to.",
            error.errno,
            _parent(),
        )

    def _write(self, name: str, content: bytes, progress: native.Progress | None) -> None:
        with commit.renaming(name, progress):
            self._remote.write(name, content)

    def _insist(
        self,
        what: str,
        request: Callable[[], T],
        go_on: Callable[[], bool] | None = None,
        until: float | None = None,
    ) -> T:
        """``insist``, by default as long as the save goes on; ``CKPT_FAST_OUTAGE`` if there is none."""
        if until is None:
            until = self._deadline or time.monotonic() + settings.outage_s()
        return insist(f"{what} {self.name}", request, self._judge, until, go_on or self._goes_on)

    def _goes_on(self) -> bool:
        return self._progress is None or not self._progress.stopped

    def _require(self, go_on: Callable[[], bool]) -> None:
        if not go_on():
            raise CheckpointWriteError(f"the upload to {self.name} was cancelled", errno.ECANCELED, self.name)

    @contextlib.contextmanager
    def _failures(self, what: str, consequence: str = "The checkpoint was not published") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise CheckpointWriteError(
                f"cannot {what} {self.name}: {self._judge.cause_of(error)}. {consequence}; those under "
                "other names are untouched. See that the storage can be reached and written to with the "
                "credentials of its profile on this rank, then save again.",
                getattr(error, "errno", None),
                self.name,
            ) from error


def _parent() -> str:
    """The directory that spools are made in."""
    return settings.spool_directory() or tempfile.gettempdir()


def _claim_in(directory: str) -> Claim:
    free, total = system.disk_space(directory)
    device = os.stat(directory).st_dev
    return Claim(0, f"{socket.gethostname()} {device}", free if total else None)
