# SPDX-License-Identifier: Apache-2.0
"""A bucket of the S3 server, and the runs that the tests save to it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.compat import MultiStorageClientFeature
from ckpt_fast.storage import patience
from ckpt_fast.trainer.places.paths import get_checkpoint_train_state_filename
from ckpt_fast.trainer.places.trackers import parse_tracker, read_train_state
from tests.models import Run, Setup, differences, other
from tests.object_server import ObjectServer, write_config

SETUP = Setup(distributed=True, reshardable=True)

_numbers = itertools.count()


@dataclass(frozen=True)
class Bucket:
    """A bucket with a profile of its own: the client keeps those it has seen. Ranks get it as an argument.

    Attributes:
        name: of the bucket, and of the profile.
        spool: see ``CKPT_FAST_SPOOL``.
        config: see ``MSC_CONFIG``; the profile that ends in "-lost" is of a bucket that does not exist.
    """

    server: ObjectServer
    name: str
    spool: str
    config: str

    @property
    def url(self) -> str:
        return f"msc://{self.name}/run"

    def of(self, step: int) -> str:
        return f"{self.url}/iter_{step:07d}"

    @contextlib.contextmanager
    def in_use(self, **variables: str) -> Iterator[None]:
        """Enable object storage in this process, with quick repetitions."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MultiStorageClientFeature, "_enabled", True)
            patch.setattr(patience, "_FIRST_PAUSE_S", 0.05)
            variables |= {"CKPT_FAST_SPOOL": self.spool, "MSC_CONFIG": self.config}
            for name, value in variables.items():
                patch.setenv(name, value)
            yield

    def tracked(self) -> tuple[int, int] | None:
        """Return what the two trackers name; None without them."""
        if f"run/{os.path.basename(get_checkpoint_train_state_filename('', 'latest'))}" not in self.keys():
            return None
        with self.in_use():
            ours = read_train_state.read(get_checkpoint_train_state_filename(self.url, prefix="latest"))
            return int(ours.step), parse_tracker(f"{self.url}/latest_checkpointed_iteration.txt")[0]

    def iterations(self) -> list[int]:
        names = {key.split("/")[1] for key in self.keys() if key.startswith("run/iter_")}
        return sorted(int(name.removeprefix("iter_")) for name in names)

    def sealed(self) -> list[int]:
        """Return the iterations that are whole."""
        keys = self.keys()
        return [step for step in self.iterations() if f"run/iter_{step:07d}/metadata.json" in keys]

    def keys(self) -> set[str]:
        return set(self.server.objects(self.name))


def new_bucket(server: ObjectServer, directory: Path, retries: bool = False, **options: Any) -> Bucket:
    """Create a bucket, and a spool in ``directory``; for the rest see ``ObjectServer.profile``."""
    name = f"bucket-{os.getpid()}-{next(_numbers)}"
    server.clear()
    server.make_bucket(name)
    (directory / "spool").mkdir()
    profiles = {
        name: server.profile(name, retries, **options),
        f"{name}-lost": server.profile(f"{name}-lost", retries),
    }
    config = write_config(directory / "msc.yaml", profiles)
    return Bucket(server, name, str(directory / "spool"), config)


def train_and_save(bucket: Bucket, steps: int, **config: Any) -> dict[int, dict[str, Any]]:
    """Train in a new run, and save after each step; return the fingerprints by step."""
    prints = {}
    with Run(SETUP, save=bucket.url, **config) as run:
        if config.get("async_save"):
            run.state.initialize_async_checkpoint_worker()
        for step in range(1, steps + 1):
            run.train(1)
            run.save()
            prints[step] = run.fingerprint()
            if config.get("async_save"):
                maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        if config.get("async_save"):
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True, terminate=True)
    return prints


def resume(bucket: Bucket, expected: dict[int, dict[str, Any]], step: int, **config: Any) -> list[str]:
    """Load into a run in another state; return where it differs from ``expected[step]``."""
    with Run(other(SETUP), load=bucket.url, **config) as run:
        run.train(2)
        loaded = run.load()[0]
        return differences(expected[step], run.fingerprint()) + ([] if loaded == step else [f"step {loaded}"])
