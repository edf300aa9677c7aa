# SPDX-License-Identifier: Apache-2.0
"""Faults at the k-th call that changes the disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

from ckpt_fast import native
from ckpt_fast.storage import commit, replacement


class Faults:
    """Counts the calls that change the disk, and makes one of them fail.

    Nothing is actually synced: no test here can cut the power, and all must be fast.

    Args:
        at: number of the call to fail, from 0; None only counts.
        fault: replaces that call; gets the name of the function and its arguments.
    """

    def __init__(self, at: int | None, fault: Callable[..., Any]) -> None:
        self.count = 0
        self._at = at
        self._fault = fault

    @contextlib.contextmanager
    def injected(self) -> Iterator[Faults]:
        implementation = native.engine()
        write_files = implementation.write_files
        originals: dict[str, Callable[..., Any]] = {
            "mkdir": os.mkdir,
            "rename": os.rename,
            "replace": os.replace,
            "_exchange": replacement._exchange,
            "unlink": os.unlink,
            "fsync": lambda _: None,
            "write_files": lambda *paths, **columns: write_files(*paths, **{**columns, "fsync": False}),
        }
        with contextlib.ExitStack() as stack:
            # As the first time: directories may be recreated with the same names.
            stack.enter_context(mock.patch.object(commit, "_durable", set()))
            for name, original in originals.items():
                home = {"write_files": implementation, "_exchange": replacement}.get(name, os)
                stack.enter_context(mock.patch.object(home, name, self._counted(name, original)))
            yield self

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number == self._at:
                return self._fault(name, original, *arguments, **options)
            return original(*arguments, **options)

        return call


def fail(_name: str, _original: Callable[..., Any], *_arguments: Any, **_options: Any) -> NoReturn:
    """Do nothing and report a broken disk."""
    raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")


def die(_name: str, _original: Callable[..., Any], *_arguments: Any, **_options: Any) -> NoReturn:
    """End the process before the call."""
    os._exit(0)


def tear(name: str, original: Callable[..., Any], *arguments: Any, **options: Any) -> NoReturn:
    """End the process in the middle of the call: data files are half written."""
    if name == "write_files":
        original(*arguments, **options)
        for path in arguments[0]:
            os.truncate(path, os.path.getsize(path) // 2)
    os._exit(0)
