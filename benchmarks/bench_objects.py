# SPDX-License-Identifier: Apache-2.0
"""Measure saves to object storage, and loads from it, against an S3 server on this machine.

    python benchmarks/bench_objects.py --gigabytes 0.1 --rounds 3 --path DIR

The server is that of the tests (moto, in Python) or, with --endpoint, another one: its bucket
"ckpt-fast-bench" is created, and emptied in the end. The limit is what multi-storage-client needs to upload,
or download, two files that together have the same size, one after the other. All rivals use that client, but
for s3fs, which is only measured if it is installed: it pins another botocore.
"""

from __future__ import annotations

import argparse
import atexit
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import harness
import rivals
import states
import torch.distributed.checkpoint as dcp
import yaml

from ckpt_fast import compat
from ckpt_fast.storage.objects.client import object_storage

BUCKET = "ckpt-fast-bench"
PROFILE = "bench"
KEYS = {"access_key": "bench", "secret_key": "bench-secret"}


class MegatronCore(rivals.MegatronCore):
    """Stock Megatron-Core with multi-storage-client."""

    def save(self, wrapped: Any, path: Any) -> None:
        compat.dist_checkpointing.save(wrapped, str(path))


class Dcp(rivals.Rival):
    """torch.distributed.checkpoint with multi-storage-client's writer and reader."""

    package = "multistorageclient"

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self.name = f"DCP msc, {threads} thread{'s' * (threads > 1)}"

    def save(self, wrapped: Any, path: Any) -> None:
        from multistorageclient.contrib.torch.filesystem import MultiStorageFileSystemWriter

        writer = MultiStorageFileSystemWriter(path, thread_count=self._threads)
        dcp.save(wrapped, storage_writer=writer)

    def load(self, path: Any, wrapped: Any) -> None:
        from multistorageclient.contrib.torch.filesystem import MultiStorageFileSystemReader

        reader = MultiStorageFileSystemReader(path, thread_count=self._threads)
        dcp.load(wrapped, storage_reader=reader)


class Fsspec(rivals.Rival):
    """torch.distributed.checkpoint with its fsspec writer and reader."""

    name = "DCP fsspec"
    package = "s3fs"

    def __init__(self, endpoint: str) -> None:
        self._options = {
            "key": KEYS["access_key"],
            "secret": KEYS["secret_key"],
            "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"},
        }

    def save(self, wrapped: Any, path: Any) -> None:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        dcp.save(wrapped, storage_writer=FsspecWriter(_s3(path), **self._options))

    def load(self, path: Any, wrapped: Any) -> None:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        dcp.load(wrapped, storage_reader=FsspecReader(_s3(path), **self._options))


def _s3(url: str) -> str:
    return str(url).replace(f"msc://{PROFILE}", f"s3://{BUCKET}")


def raw(directory: Path, nbytes: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what uploads two files of ``nbytes`` together, and what downloads them."""
    client = object_storage(f"msc://{PROFILE}/raw").resolve_storage_client(f"msc://{PROFILE}/raw")[0]
    files = [directory / f"raw.{number}" for number in range(2)]
    for file in files:
        with file.open("wb") as stream:
            for _ in range(max(1, nbytes // 2 >> 20)):
                stream.write(os.urandom(1 << 20))

    def upload() -> None:
        for file in files:
            client.upload_file(f"raw/{file.name}", str(file))

    def download() -> None:
        for file in files:
            client.download_file(f"raw/{file.name}", str(file))

    return upload, download


def measure_saves(
    present: list[rivals.Rival],
    state: states.State,
    upload: Callable[[], None],
    remove: Callable[[str], None],
) -> list[harness.Contestant]:
    """Return the limit, and a save of each rival, which is removed after each round."""

    def contestant(rival: rivals.Rival) -> harness.Contestant:
        wrapped = rival.wrap(state)
        url: Any = f"msc://{PROFILE}/save/{rival.name.replace(' ', '-').replace(',', '')}"
        return harness.Contestant(rival.name, lambda: rival.save(wrapped, url), after=lambda: remove("save/"))

    return [harness.Contestant("limit: upload", upload), *map(contestant, present)]


def measure_loads(
    present: list[rivals.Rival], state: states.State, download: Callable[[], None]
) -> list[harness.Contestant]:
    """Save once with each rival; return the limit, and a load of each, which is compared with the state."""

    def contestant(rival: rivals.Rival) -> harness.Contestant:
        url: Any = f"msc://{PROFILE}/load/{rival.name.replace(' ', '-').replace(',', '')}"
        rival.save(rival.wrap(state), url)
        loaded = states.empty_like(state)
        wrapped = rival.wrap(loaded)
        return harness.Contestant(
            rival.name,
            lambda: rival.load(url, wrapped),
            check=lambda: states.assert_equal(loaded, state),
        )

    return [harness.Contestant("limit: download", download), *map(contestant, present)]


def connect(endpoint: str, directory: Path) -> Callable[[str], None]:
    """Create the bucket and the profile; return what removes the objects below a prefix."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEYS["access_key"],
        aws_secret_access_key=KEYS["secret_key"],
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)

    def remove(prefix: str) -> None:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
            for item in page.get("Contents", []):
                client.delete_object(Bucket=BUCKET, Key=item["Key"])

    options = {"base_path": BUCKET, "endpoint_url": endpoint, "region_name": "us-east-1"}
    profile = {
        "storage_provider": {"type": "s3", "options": options},
        "credentials_provider": {"type": "S3Credentials", "options": KEYS},
    }
    config = directory / "msc.yaml"
    config.write_text(yaml.safe_dump({"profiles": {PROFILE: profile}}))
    os.environ.update(MSC_CONFIG=str(config), CKPT_FAST_SPOOL=str(directory))
    compat.MultiStorageClientFeature.enable()
    return remove


def start_server() -> str:
    """Start the server of the tests, which ends with this process; return its endpoint."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests import object_server

    server = object_server.running()
    atexit.register(server.__exit__, None, None, None)
    return server.__enter__().endpoint


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", help="URL of an S3 server; its keys are those of this script")


def main() -> None:
    options = harness.parse_arguments(__doc__, add_options, gigabytes=0.1, rounds=3)
    rivals.start_process_group()
    endpoint = options.endpoint or start_server()
    remove = connect(endpoint, options.path)
    report = harness.Report(options)
    state = states.chosen(options)
    nbytes = states.total_nbytes(state)
    everyone = [rivals.MegatronCoreDoor(), MegatronCore(), Dcp(1), Dcp(4), Fsspec(endpoint)]
    reasons = {rival.name: rival.available() for rival in everyone}
    present = [rival for rival in everyone if reasons[rival.name] is None]
    upload, download = raw(options.path, nbytes)
    size = f"{len(state)} tensors, {nbytes / 1e9:.2f} GB, {options.rounds} rounds"
    try:
        for what, contestants in (
            ("save to object storage", measure_saves(present, state, upload, remove)),
            ("load from object storage", measure_loads(present, state, download)),
        ):
            chosen = harness.selected(contestants, options.only)
            times = harness.measure(chosen, options.rounds)
            title, limit = f"{what}, {size}", contestants[0].name
            report.add(harness.table(title, times[harness.TOTAL], chosen, nbytes, "mcore", limit))
    finally:
        remove("")
    report.add([f"not measured: {name} ({reason})" for name, reason in reasons.items() if reason])
    report.finish()


if __name__ == "__main__":
    main()
