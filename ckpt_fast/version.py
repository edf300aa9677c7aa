# SPDX-License-Identifier: Apache-2.0
"""The release of this build: ``setup.py`` reads it from here."""

from __future__ import annotations

from importlib import metadata

RELEASE = "0.1.0"


def build_version(cuda_release: tuple[int, int] | None) -> str:
    """The version of a build by PEP 440: "0.1.0+cu130" with CUDA 13.0, "0.1.0" without CUDA."""
    return RELEASE if cuda_release is None else f"{RELEASE}+cu{cuda_release[0]}{cuda_release[1]}"


def version() -> str:
    """The version of the running build, derived from the modules present."""
    from ckpt_fast import native  # setup.py runs this file before the package can be imported

    return build_version(native.cuda_release())


def installed(package: str) -> str:
    """The version of an installed distribution package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
