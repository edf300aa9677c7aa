# SPDX-License-Identifier: Apache-2.0
"""Runs native tests on the compiled engine and on its Python fallback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckpt_fast import native


@pytest.fixture(params=["engine", "fallback"])
def native_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the implementation that ``native`` uses during the test."""
    with native.using(request.param):
        yield request.param
