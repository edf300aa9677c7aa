# SPDX-License-Identifier: Apache-2.0
"""Tests marked ``gpu`` need the CUDA part too: without it torch would do the work, and be what is tested.

They are skipped if it is missing, or fail with the reason if FAIL_WITHOUT_GPU=1.
"""

from __future__ import annotations

import os

import pytest
import torch

from ckpt_fast import native


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if native.cuda() is None:
        return "ckpt_fast.native._cuda is not built, or its driver shows no device"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    missing = _missing() if item.get_closest_marker("gpu") else None
    if missing is None:
        return
    if os.environ.get("FAIL_WITHOUT_GPU") == "1":
        pytest.fail(f"FAIL_WITHOUT_GPU=1, but {missing}", pytrace=False)
    pytest.skip(missing)
