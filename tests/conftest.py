# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# How long an example takes says something of the machine.
hypothesis.settings.register_profile("ckpt_fast", deadline=None)
hypothesis.settings.load_profile("ckpt_fast")


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability is given up, for tests of many small saves."""
    monkeypatch.setenv("CKPT_FAST_FSYNC", "0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none, unless a job exists to run just these.

    With ``--setup-only`` no test runs; fixtures and parameters need no GPU.
    """
    if torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_GPU") == "1" or config.option.setuponly:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device (FAIL_WITHOUT_GPU=1 makes this a failure)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
