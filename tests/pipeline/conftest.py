# SPDX-License-Identifier: Apache-2.0
"""Runs pipeline tests on the compiled engine and on its Python fallback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from ckpt_fast import native

# Fixtures here choose an implementation or make a directory; examples do not disturb each other through them.
settings.register_profile(
    "pipeline", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
settings.load_profile("pipeline")


@pytest.fixture(params=["engine", "fallback"])
def native_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the implementation that ``native`` uses during the test."""
    with native.using(request.param):
        yield request.param
