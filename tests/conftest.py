# SPDX-License-Identifier: Apache-2.0
"""Fixtures and hooks for all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from ckpt_fast import native, once
from tests import object_server as object_servers
from tests.object_server import ObjectServer

# Nothing is compiled here, and what torch would import for that is a quarter of each process's startup time.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# Examples have no deadline: how long one takes depends on the machine. Function-scoped fixtures only choose
# an implementation or create a directory, so sharing them between examples is harmless.
hypothesis.settings.register_profile(
    "ckpt_fast",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    database=None,
)
hypothesis.settings.load_profile("ckpt_fast")


@pytest.fixture(autouse=True)
def nothing_was_said() -> None:
    """Let each test see the warnings that are given once in a process."""
    once._said.clear()


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable fsync, for tests that make many small saves."""
    monkeypatch.setenv("CKPT_FAST_FSYNC", "0")


@pytest.fixture(params=["engine", "fallback"])
def native_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the name of the implementation that ``native`` uses during the test."""
    with native.using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def slow_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a library to preload; see its source."""
    if shutil.which("cc") is None:
        pytest.skip("a C compiler makes the slow disk")
    library = tmp_path_factory.mktemp("slow_disk") / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """Yield an S3 server."""
    for package in ("moto", "flask", "boto3", "multistorageclient"):
        pytest.importorskip(package)
    with object_servers.running() as server:
        yield server


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Skip tests that need a GPU if there is none, unless the job exists to run exactly these.

    Fixtures and parameters, which need no GPU, are set up before, so their errors show everywhere.
    """
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("FAIL_WITHOUT_GPU") != "1":
        pytest.skip("needs a CUDA device (FAIL_WITHOUT_GPU=1 makes this a failure)")
