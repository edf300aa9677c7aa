# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from ckpt_fast import native

# Nothing is compiled here, and what torch would import for that takes each process a quarter of its start.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# How long an example takes says something of the machine. Fixtures choose an implementation or make a
# directory; examples do not disturb each other through them.
hypothesis.settings.register_profile(
    "ckpt_fast",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    database=None,
)
hypothesis.settings.load_profile("ckpt_fast")


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability is given up, for tests of many small saves."""
    monkeypatch.setenv("CKPT_FAST_FSYNC", "0")


@pytest.fixture(params=["engine", "fallback"])
def native_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the implementation that ``native`` uses during the test."""
    with native.using(request.param):
        yield request.param


@pytest.fixture(scope="session")
def slow_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload; see its source."""
    if shutil.which("cc") is None:
        pytest.skip("a C compiler makes the slow disk")
    library = tmp_path_factory.mktemp("slow_disk") / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Skip a test that needs a GPU where there is none, unless a job exists to run just these.

    Not before its fixtures and parameters are set up, which need no GPU: their errors are seen everywhere.
    """
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("FAIL_WITHOUT_GPU") != "1":
        pytest.skip("needs a CUDA device (FAIL_WITHOUT_GPU=1 makes this a failure)")
