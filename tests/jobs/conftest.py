# SPDX-License-Identifier: Apache-2.0
"""Programs that exit with a save in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forks import Ended, forks_of

Exits = Callable[..., list[Ended]]


@pytest.fixture(scope="session")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exits]:
    """Return what each rank ends with, given a directory, how it exits, and the number of ranks."""
    with forks_of(
        ["tests.jobs.exiting"], tmp_path_factory.mktemp("outputs"), {"CKPT_FAST_FSYNC": "0"}
    ) as forks:

        def run(directory: Path, how: str, ranks: int = 1) -> list[Ended]:
            programs = [
                forks.begin(
                    "tests.jobs.exiting", "main", str(directory), how, RANK=str(rank), WORLD_SIZE=str(ranks)
                )
                for rank in range(ranks)
            ]
            return [program.wait() for program in programs]

        yield run
