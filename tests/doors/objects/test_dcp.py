# SPDX-License-Identifier: Apache-2.0
"""torch DCP with ``msc://`` URLs, after ``install`` and without: who writes, and what fails."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import ckpt_fast
from ckpt_fast.compat import MultiStorageClientFeature
from ckpt_fast.errors import CheckpointNotFoundError, CheckpointWriteError, StorageError, UnavailableError
from ckpt_fast.format.manifest import split_manifest
from ckpt_fast.storage.objects import client
from tests.doors.dcp.ranks import FSDP2_ON_CPU, Trained, wrong
from tests.doors.dcp.states import blank, differences, training_state
from tests.doors.installing.test_background import uploaded
from tests.helpers import run_ranks
from tests.object_server import Fault
from tests.trainer.objects.bucket import Bucket

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
]
ROOT = Path(__file__).resolve().parents[3]
DATA = r"PUT .*distcp"


def is_ours(url: str) -> bool:
    """Return whether ckpt_fast has written a checkpoint."""
    store, key = client.client_and_key(client.import_client(), f"{url}/.metadata")
    return split_manifest(bytes(store.read(key)))[1] is not None


def clients_own() -> tuple[Any, Any]:
    """Return the writer and reader that multi-storage-client has for torch DCP."""
    from multistorageclient.contrib.torch import filesystem

    return filesystem.MultiStorageFileSystemWriter, filesystem.MultiStorageFileSystemReader


SAVES: dict[str, Any] = {
    "id": lambda state, url: dcp.save(state, checkpoint_id=url),
    "id, as a Path": lambda state, url: dcp.save(state, checkpoint_id=Path(url)),
    "writer": lambda state, url: dcp.save(state, storage_writer=dcp.FileSystemWriter(url, thread_count=2)),
    "background": lambda state, url: uploaded(dcp.async_save(state, checkpoint_id=url)).result(60),
}
LOADS: dict[str, Any] = {
    "id": lambda state, url: dcp.load(state, checkpoint_id=url),
    "id, as a Path": lambda state, url: dcp.load(state, checkpoint_id=Path(url)),
    "reader": lambda state, url: dcp.load(state, storage_reader=dcp.FileSystemReader(url)),
}


@pytest.mark.parametrize("save", SAVES)
def test_after_install(save: str, bucket: Bucket) -> None:
    expected = training_state()
    with ckpt_fast.install(megatron=False):
        SAVES[save](expected, bucket.url)
        assert is_ours(bucket.url)
        for load in LOADS.values():
            found = blank(expected)
            load(found, bucket.url)
            assert differences(expected, found) == []
    report = ckpt_fast.last_report()
    assert report is not None and report.directory == bucket.url
    found = blank(expected)
    dcp.load(found, storage_reader=clients_own()[1](bucket.url))
    assert differences(expected, found) == []


@pytest.mark.parametrize("load", LOADS)
def test_what_stock_has_saved_is_loaded(load: str, bucket: Bucket) -> None:
    expected = training_state()
    dcp.save(expected, storage_writer=clients_own()[0](bucket.url))
    assert not is_ours(bucket.url)
    with ckpt_fast.install(megatron=False):
        found = blank(expected)
        LOADS[load](found, bucket.url)
    assert differences(expected, found) == []


def test_others_keep_their_urls(bucket: Bucket) -> None:
    """What is derived from torch's classes, and other schemes; torch itself once it is all undone."""
    writer, reader = clients_own()
    with ckpt_fast.install(megatron=False):
        assert type(writer(bucket.url)) is writer and type(reader(bucket.url)) is reader
        expected = training_state()
        dcp.save(expected, storage_writer=writer(bucket.url))
        assert not is_ours(bucket.url)
        for kind in (dcp.FileSystemWriter, dcp.FileSystemReader):
            assert kind.validate_checkpoint_id(bucket.url)
            assert not kind.validate_checkpoint_id("s3://bucket/run")
            derived = type("Derived", (kind,), {})
            assert not derived.validate_checkpoint_id(bucket.url)
    for kind in (dcp.FileSystemWriter, dcp.FileSystemReader):
        assert not kind.validate_checkpoint_id(bucket.url)


def test_by_hand(bucket: Bucket) -> None:
    """Another save to the same URL replaces the first one, unless it must not; planners in columns."""
    for seed in (1, 2):
        expected = training_state(seed)
        writer = ckpt_fast.FastStorageWriter(bucket.url)
        dcp.save(expected, storage_writer=writer, planner=ckpt_fast.FastSavePlanner())
        assert writer.path == bucket.url
        found = blank(expected)
        reader = ckpt_fast.FastStorageReader(bucket.url)
        dcp.load(found, storage_reader=reader, planner=ckpt_fast.FastLoadPlanner())
        assert differences(expected, found) == []
    with pytest.raises(CheckpointException) as raised:
        dcp.save(expected, storage_writer=ckpt_fast.FastStorageWriter(bucket.url, overwrite=False))
    assert f"{bucket.url} holds a checkpoint" in str(raised.value)
    assert sorted(bucket.keys()) == ["run/.metadata", "run/__0_0.distcp"]


def test_what_is_not_there(bucket: Bucket) -> None:
    with ckpt_fast.install(megatron=False):
        for url, error in (
            (bucket.url, CheckpointNotFoundError),
            (f"msc://{bucket.name}-lost/run", StorageError),
            ("msc://no-such-profile/run", StorageError),
        ):
            with pytest.raises(CheckpointException) as raised:
                dcp.load({"w": torch.zeros(3)}, checkpoint_id=url)
            (found,) = raised.value.failures.values()
            assert isinstance(found[0], error) and url in str(found[0])
            assert f"{bucket.spool}/" not in str(found[0])
        dcp.save({"w": torch.ones(3)}, checkpoint_id=bucket.url)
        with pytest.raises(CheckpointException) as raised:
            dcp.load({"x": torch.zeros(3)}, checkpoint_id=bucket.url)
        assert "Missing key in checkpoint state_dict: x" in str(raised.value)


def save_sharded(rank: int, bucket: Bucket, directory: str) -> list[str]:
    """Save in both ways, and load what either has saved into another state."""
    problems = []
    with bucket.in_use(), pytest.MonkeyPatch.context() as patch, ckpt_fast.install(megatron=False):
        patch.setattr(MultiStorageClientFeature, "_enabled", False)
        for name, save in (("now", dcp.save), ("later", dcp.async_save)):
            run = Trained(seed=1)
            whole, url = run.whole(), f"{bucket.url}/{name}"
            response: Any = save(run.state(), checkpoint_id=url)
            if name == "later":
                for parameter in run.model.parameters():
                    parameter.data.to_local().fill_(-1)
                uploaded(response).result(timeout=60)
            if rank == 0:
                torch.save(whole, f"{directory}/{name}.pt")
            dist.barrier()
            problems += [] if is_ours(url) else [f"{url} is not ours"]
            other = Trained(seed=2)
            other.load(None, checkpoint_id=url)
            problems += wrong(other.whole(), f"{directory}/{name}.pt")
    return problems


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 of this torch needs a GPU")
def test_two_ranks(bucket: Bucket, tmp_path: Path) -> None:
    assert run_ranks(save_sharded, 2, bucket, str(tmp_path)) == [[], []]


def save_alone(rank: int, bucket: Bucket) -> bool:
    """Each rank saves what is its own, twice, and without collectives."""
    with bucket.in_use(), ckpt_fast.install(megatron=False):
        for number in (1, 2):
            state = {"rank": torch.full((5,), float(10 * number + rank))}
            dcp.save(state, checkpoint_id=bucket.url, use_collectives=False)
            dist.barrier()
            found = {"rank": torch.zeros(5)}
            dcp.load(found, checkpoint_id=bucket.url)
            dist.barrier()
            if not torch.equal(found["rank"], state["rank"]):
                return False
    return True


@pytest.mark.skipif(
    "use_collectives" not in inspect.signature(dcp.save).parameters, reason="torch knows no use_collectives"
)
def test_without_collectives(bucket: Bucket) -> None:
    assert run_ranks(save_alone, 2, bucket) == [True, True]
    names = {f"run/__{rank}{end}" for rank in (0, 1) for end in (".metadata", "_0.distcp")}
    assert bucket.keys() == names


# --- Failures ---------------------------------------------------------------------------------------------


def save_in_background(state: dict[str, Any], **options: Any) -> None:
    uploaded(dcp.async_save(state, **options)).result(timeout=60)


def save_and_fail(rank: int, bucket: Bucket) -> list[str]:
    """Save, in the foreground and in the background; returns what was raised."""
    raised = []
    state = {"w": torch.ones(3), f"of {rank}": torch.ones(5)}
    with bucket.in_use(), ckpt_fast.install(megatron=False):
        for save in (
            dcp.save,
            lambda *args, **options: uploaded(dcp.async_save(*args, **options)).result(60),
        ):
            with pytest.raises(CheckpointException) as error:
                save(state, checkpoint_id=bucket.url)
            raised.append(str(error.value))
            dist.barrier()
    return raised


def test_an_upload_that_fails_on_one_rank_fails_on_all(bucket: Bucket) -> None:
    bucket.server.fail(Fault("403", r"PUT .*__1_0\.distcp"))
    for messages in run_ranks(save_and_fail, 2, bucket):
        for message in messages:
            assert f"cannot upload __1_0.distcp to {bucket.url}" in message and "AccessDenied" in message
    assert [key for key in sorted(bucket.keys()) if key.endswith("metadata")] == []


def test_an_outage_passes(bucket: Bucket) -> None:
    expected = training_state()
    bucket.server.fail(Fault("503", DATA, 3), Fault("500", r"PUT .*/\.metadata", 2), Fault("503", "^GET ", 2))
    with ckpt_fast.install(megatron=False):
        dcp.save(expected, checkpoint_id=bucket.url)
        found = blank(expected)
        dcp.load(found, checkpoint_id=bucket.url)
    assert differences(expected, found) == []


def test_a_flipped_bit_is_found(bucket: Bucket) -> None:
    state = {"w": torch.ones(1000)}
    with ckpt_fast.install(megatron=False):
        dcp.save(state, checkpoint_id=bucket.url)
        store, key = client.client_and_key(client.import_client(), f"{bucket.url}/__0_0.distcp")
        content = bytearray(store.read(key))
        content[len(content) // 2] ^= 1
        store.write(key, bytes(content))
        with pytest.raises(CheckpointException) as raised:
            dcp.load({"w": torch.zeros(1000)}, checkpoint_id=bucket.url)
    assert "CheckpointCorruptError" in str(raised.value) and f"{bucket.url}/__0_0.distcp" in str(raised.value)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Let Ctrl-C interrupt, which processes in the background of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads")
@pytest.mark.usefixtures("interrupts")
def test_what_a_save_that_was_left_has_asked_for_may_still_arrive(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the next save to the same URL waits for it."""
    go = threading.Event()
    put = client.ObjectStore.put

    def held(self: Any, name: str, path: str) -> None:
        if not go.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert go.wait(60)
        put(self, name, path)

    monkeypatch.setattr(client.ObjectStore, "put", held)
    monkeypatch.setattr("ckpt_fast.jobs.worker.LEAVE_S", 0.1)
    with pytest.raises((KeyboardInterrupt, CheckpointException)):
        dcp.save({"w": torch.ones(3)}, storage_writer=ckpt_fast.FastStorageWriter(bucket.url))
    with monkeypatch.context() as patch:
        patch.setenv("CKPT_FAST_TIMEOUT", "1")
        with pytest.raises(CheckpointException) as raised:
            dcp.save({"w": torch.zeros(3)}, storage_writer=ckpt_fast.FastStorageWriter(bucket.url))
    (found,) = raised.value.failures.values()
    assert isinstance(found[0], CheckpointWriteError) and "is not over" in str(found[0])
    go.set()
    dcp.save({"w": torch.zeros(3)}, storage_writer=ckpt_fast.FastStorageWriter(bucket.url))
    loaded = {"w": torch.ones(3)}
    dcp.load(loaded, storage_reader=ckpt_fast.FastStorageReader(bucket.url))
    assert not loaded["w"].any()


# --- Without the packages -----------------------------------------------------------------------------------


def test_without_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that says what is missing, not a directory of the name "msc:"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "multistorageclient", None)
    state = {"w": torch.ones(3)}
    with ckpt_fast.install(megatron=False):
        for call in (*SAVES.values(), *LOADS.values()):
            with pytest.raises(CheckpointException) as raised:
                call(state, "msc://profile/run")
            (found,) = raised.value.failures.values()
            assert isinstance(found[0], UnavailableError)
            assert "install multi-storage-client" in str(found[0])
    assert os.listdir() == []


SCRIPT = """
import importlib.abc, os, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.split(".")[0] == "megatron":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocked())
import ckpt_fast, torch
import torch.distributed.checkpoint as dcp
ckpt_fast.install()
dcp.save({"w": torch.arange(9.0)}, checkpoint_id=sys.argv[1])
found = {"w": torch.zeros(9)}
dcp.load(found, checkpoint_id=sys.argv[1])
assert torch.equal(found["w"], torch.arange(9.0)) and "megatron.core" not in sys.modules
"""


def test_without_megatron_core(bucket: Bucket) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, bucket.url],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert is_ours(bucket.url)
