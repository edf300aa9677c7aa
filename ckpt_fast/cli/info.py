# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast info [DIR]``: what of the library is in use here, and what is in a checkpoint."""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.version import version


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("info", help="show the engine in use, or the content of a checkpoint")
    parser.add_argument("directory", nargs="?", metavar="DIR", help="iteration directory")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0, or 1 when the checkpoint cannot be read."""
    lines = _library()
    try:
        if options.directory is not None:
            lines = _checkpoint(options.directory)
    except CheckpointError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


def versions() -> list[str]:
    """The installed versions: ckpt_fast, its native parts, and the packages it works with."""
    release = native.cuda_release()
    return [
        f"ckpt-fast {version()}",
        f"native engine: {'built' if find_spec('ckpt_fast.native._engine') else 'not built'}",
        f"CUDA module: {'not built' if release is None else f'built with CUDA {release[0]}.{release[1]}'}",
        *(f"{package}: {_installed(package)}" for package in ("torch", "megatron-core")),
    ]


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _library() -> list[str]:
    cuda = native.cuda()
    return [
        f"engine: {native.engine().__name__} ({', '.join(native.cpu_features()) or 'portable code'})",
        f"cuda: {'not in use' if cuda is None else f'{cuda.device_count()} devices'}",
        f"threads: {settings.io_threads()}, chunk: {settings.chunk_bytes()} bytes, "
        f"direct I/O: {settings.direct_io()}, fsync: {settings.fsync_enabled()}",
    ]


def _checkpoint(directory: str) -> list[str]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from ckpt_fast.pipeline.load.decode import read_dcp_metadata

    entries = read_dcp_metadata(directory).state_dict_metadata
    lines = []
    for name, entry in sorted(entries.items()):
        if isinstance(entry, TensorStorageMetadata):
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            lines.append(f"{name}  {dtype} {list(entry.size)} in {len(entry.chunks)} pieces")
        else:
            lines.append(f"{name}  object")
    return lines
