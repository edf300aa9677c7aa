# SPDX-License-Identifier: Apache-2.0
"""Ranks with a library preloaded that watches their calls."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.helpers import run_ranks, stop_ranks

Ranks = Callable[..., Any]


@contextlib.contextmanager
def ranks_with(source: Path, directory: Path, **environment: str) -> Iterator[Ranks]:
    """Yield ``run_ranks``, with a library preloaded that does nothing until it is given a path.

    Args:
        source: of the library.
        directory: where it is compiled to.
        environment: variables of the ranks.
    """
    library = directory / "preloaded.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, LD_PRELOAD=str(library), **environment):
            pool.submit(os.getpid).result()  # the process starts with its first task

        def run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            # The intermediate process need not import anything.
            name = SimpleNamespace(__module__=function.__module__, __qualname__=function.__qualname__)
            return pool.submit(run_ranks, name, *args, **options).result()

        yield run
        pool.submit(stop_ranks).result()
