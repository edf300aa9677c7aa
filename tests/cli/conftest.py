# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that no test changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli import running


@pytest.fixture(scope="session")
def dcp_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of "ours", "stock" and "fsdp", all of one state dict in files of torch DCP."""
    return running.save_dcp(tmp_path_factory.mktemp("dcp"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of checkpoints of one run on two ranks, by "ours" and "stock" Megatron-Core."""
    return running.save_megatron(tmp_path_factory.mktemp("megatron"))


@pytest.fixture(scope="session")
def local_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running.save_local(tmp_path_factory.mktemp("local"))
