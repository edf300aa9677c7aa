# SPDX-License-Identifier: Apache-2.0
"""Saves to object storage, interrupted repeatedly.

``python -m tests.crash.campaigns.uploads DOOR WHAT DIRECTORY MOMENTS`` works like ``interruptions``. The
storage is multi-storage-client's file provider; each call to it is delayed.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
import yaml

from ckpt_fast.compat import MultiStorageClientFeature
from ckpt_fast.doors.dcp.upload import Upload
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.storage.objects import ObjectStore
from ckpt_fast.trainer.places.paths import remove_file
from tests.crash.campaigns import interruptions
from tests.crash.campaigns.doors import (
    Dcp,
    Documented,
    DocumentedAsync,
    Door,
    MegatronCore,
    MegatronCoreAsync,
    Queued,
    one_rank,
)

PROFILE = "crash"


class DcpUpload(Queued, Dcp):
    """Background saves through another package's storage writer, which cannot be interrupted."""

    def save(self, directory: str, number: float) -> None:
        from multistorageclient.contrib.torch.filesystem import MultiStorageFileSystemWriter

        job = Upload(
            self._state(number),
            MultiStorageFileSystemWriter(directory),
            directory,
            lambda: remove_file(os.path.join(directory, self.seal)),
        )
        job.stage()
        self._finish(SaveHandle(job))

    def load(self, directory: str) -> float:
        from multistorageclient.contrib.torch.filesystem import MultiStorageFileSystemReader

        state = self._state(-1.0)
        dcp.load(state, storage_reader=MultiStorageFileSystemReader(directory))
        return self._number_in(state)

    def give_up(self) -> None:
        super().give_up()
        interruptions.let_go()


class Stored(Door):
    """A door, redirected to object storage.

    Args:
        door: gets URLs instead of directories.
        base: the objects are the files below it.
        spool: see ``CKPT_FAST_SPOOL``.
    """

    def __init__(self, door: Door, base: str, spool: str) -> None:
        self._door = door
        self._base = base
        self._spool = spool
        self.seal, self.is_run = door.seal, door.is_run

    def save(self, directory: str, number: float) -> None:
        self._door.polls = self.polls
        self._door.save(self._url(directory), number)

    def load(self, directory: str) -> float:
        return self._door.load(self._url(directory))

    def is_published(self, directory: str) -> bool:
        return self._door.is_published(directory)

    def give_up(self) -> None:
        self._door.give_up()

    def left(self) -> list[str]:
        return os.listdir(self._spool)

    def _url(self, directory: str) -> str:
        return f"msc://{PROFILE}/{os.path.relpath(directory, self._base)}"


DOORS: dict[str, type[Door]] = {
    "megatron-core": MegatronCore,
    "megatron-core-async": MegatronCoreAsync,
    "documented": Documented,
    "documented-async": DocumentedAsync,
    "upload": DcpUpload,
}


def set_up(directory: str) -> tuple[str, str]:
    """Enable object storage in this process; return the directory of the objects, and the spool."""
    base, spool = os.path.join(directory, "bucket"), os.path.join(directory, "spool")
    os.makedirs(base)
    os.makedirs(spool)
    config = Path(directory, "msc.yaml")
    provider = {"type": "file", "options": {"base_path": base}}
    config.write_text(yaml.safe_dump({"profiles": {PROFILE: {"storage_provider": provider}}}))
    os.environ.update(MSC_CONFIG=str(config), CKPT_FAST_SPOOL=spool)
    MultiStorageClientFeature.enable()
    return base, spool


def make_slow() -> None:
    """Delay every call of the storage."""
    from multistorageclient.contrib.torch.filesystem import MultiStorageFileSystemWriter

    def slowly(original: Any, times: int) -> Any:
        @functools.wraps(original)
        def called(*args: Any, **options: Any) -> Any:
            time.sleep(times * int(os.environ.get("SLOW_DISK_MS", "0")) / 1000)
            return original(*args, **options)

        return called

    for name in ("put", "write", "delete", "sizes"):
        setattr(ObjectStore, name, slowly(getattr(ObjectStore, name), 1))
    for name in ("write_data", "finish"):
        original = getattr(MultiStorageFileSystemWriter, name)
        setattr(MultiStorageFileSystemWriter, name, slowly(original, 5))


def main(name: str, what: str, directory: str, moments: str) -> None:
    one_rank()
    base, spool = set_up(directory)
    make_slow()
    door = Stored(DOORS[name](), base, spool)
    result = getattr(interruptions, what)(door, base, int(moments))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
