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

from ckpt_fast import native

# Examples have no deadline: how long one takes depends on the machine. Function-scoped fixtures only choose
# an implementation or create a directory, so sharing them between examples is harmless.
hypothesis.settings.register_profile(
    "ckpt_fast",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    database=None,
)
hypothesis.settings.load_profile("ckpt_fast")


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none, unless the job exists to run exactly these.

    With ``--setup-only``, no test runs, and fixtures and parameters need no GPU.
    """
    if torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_GPU") == "1" or config.option.setuponly:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device (FAIL_WITHOUT_GPU=1 makes this a failure)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
