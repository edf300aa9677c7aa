# SPDX-License-Identifier: Apache-2.0
"""A load looks at its checkpoint once: how often files are opened, parsed and decoded, and ranks meet."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ckpt_fast import native
from ckpt_fast.doors import common_state
from ckpt_fast.pipeline import decode
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer import runs

_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "scatter_object_list",
)
_watching: list[Watch] = []


class Watch:
    """What happens in a directory, in this process, while it is watched."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.opened: Counter[str] = Counter()
        self.parsed = self.decoded = 0
        self.stats: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    def note(self, path: object) -> None:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.directory + "/"):
            self.opened[os.path.relpath(os.fspath(path), self.directory)] += 1


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _watching:
        _watching[0].note(args[0])


@contextlib.contextmanager
def watched(directory: str) -> Iterator[Watch]:
    if not hasattr(sys, "_ckpt_fast_test_hook"):
        sys.addaudithook(_audit)
        sys._ckpt_fast_test_hook = True
    watch = Watch(directory)
    with pytest.MonkeyPatch.context() as patch:
        read_extents, unpickle, decode_object = (
            native.read_extents,
            decode.unpickle_metadata,
            common_state.decode_object,
        )

        def reading(paths: list[str], *args: Any, **options: Any) -> Any:
            for path in paths:
                watch.note(path)
            return read_extents(paths, *args, **options)

        def parsing(content: bytes) -> Any:
            watch.parsed += 1
            return unpickle(content)

        def decoding(*args: Any, **options: Any) -> Any:
            watch.decoded += 1
            return decode_object(*args, **options)

        stat = os.stat

        def stating(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(watch.directory):
                watch.stats[os.path.relpath(os.fspath(path), watch.directory)] += 1
            return stat(path, *args, **options)

        def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **options: Any) -> Any:
                watch.collectives[name] += 1
                if os.environ.get("WHO"):
                    import traceback

                    st = [
                        f
                        for f in traceback.extract_stack()
                        if "ckpt_fast/" in f.filename
                        and "group.py" not in f.filename
                        and "ranks.py" not in f.filename
                        and "tests" not in f.filename
                    ]
                    print(
                        name,
                        " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in st[::-1][:5]),
                        flush=True,
                    )
                return collective(*args, **options)

            return counted

        patch.setattr(native, "read_extents", reading)
        patch.setattr(decode, "unpickle_metadata", parsing)
        patch.setattr(common_state, "decode_object", decoding)
        patch.setattr(os, "stat", stating)
        for name in _COLLECTIVES:
            patch.setattr(torch.distributed, name, counting(name, getattr(torch.distributed, name)))
        _watching.append(watch)
        try:
            yield watch
        finally:
            _watching.remove(watch)


def load(rank: int, setup: Setup, root: str, options: dict[str, Any]) -> Watch:
    with Run(setup, load=root, **options) as run, watched(root) as watch:
        run.load()
    return watch


@pytest.mark.parametrize("ranks", [1, 2])
def test_count(tmp_path, ranks):
    setup = Setup(bf16=True, distributed=True)
    root = str(tmp_path / "run")
    run_ranks(runs.save_steps, ranks, setup, root, 2, {})
    for rank, w in enumerate(run_ranks(load, ranks, setup, root, {})):
        print("RANK", rank, "parsed", w.parsed, "decoded", w.decoded)
        print("  opened", dict(w.opened))
        print("  stats", sum(w.stats.values()), dict(w.stats))
        print("  collectives", sum(w.collectives.values()), dict(w.collectives))
