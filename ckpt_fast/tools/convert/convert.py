# SPDX-License-Identifier: Apache-2.0
"""``convert``: what is asked for, and what has been done."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.storage.space import require_space
from ckpt_fast.tools import opening
from ckpt_fast.tools.convert.archives import ArchiveWriter, prepare_directory
from ckpt_fast.tools.convert.safetensors import SafetensorsWriter
from ckpt_fast.tools.convert.source import Source, token_of
from ckpt_fast.tools.streaming import Progress, no_progress

Target = Literal["torch_dist", "dcp", "safetensors"]


@dataclass(frozen=True)
class Conversion:
    """What has been converted.

    Attributes:
        source, destination: paths.
        format: of the destination.
        tensors, objects: how many of each are in the destination; the common state of Megatron-Core, or what
            became of it, not counted.
        nbytes: of the tensors.
        left_out: names of what is not: the optimizer's, where weights alone are wanted; objects, which
            safetensors files cannot hold.
        resumed: whether it went on with what an interrupted conversion had left, or was done already.
    """

    source: str
    destination: str
    format: str
    tensors: int
    objects: int
    nbytes: int
    left_out: tuple[str, ...]
    resumed: bool


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: Target,
    *,
    weights_only: bool | None = None,
    progress: Progress = no_progress,
) -> Conversion:
    """Write a checkpoint anew in another format. Local; holds at most 256 MiB of its tensors in memory.

    What an interrupted call has left in ``destination`` is used by the next one with the same arguments.
    Nothing there is a checkpoint before the last step. From torch DCP to Megatron-Core, objects become the
    common state; in the other direction, each key of the common state becomes an object.

    Args:
        source: as of ``inspect``.
        destination: a directory of a file system; created if missing. Other files in it stay.
        to: "torch_dist" (Megatron-Core), "dcp" (torch DCP) or "safetensors".
        weights_only: leave out what belongs to an optimizer; None: only where ``to`` is "safetensors".
        progress: called with the bytes written so far, and those to write.

    Raises:
        CheckpointMismatchError: the source is a local checkpoint, the destination has another checkpoint, or
            the format cannot hold what there is.
        UnsafeCheckpointError: an object that has to be taken apart is of a class that is not read.
        CheckpointWriteError: the destination cannot be written, or there is no room.
        CheckpointError: as of ``inspect``; what is read does not have its checksum.
    """
    if to not in get_args(Target):
        raise ValueError(f"to={to!r}: use one of {', '.join(get_args(Target))}")
    place = os.fspath(destination)
    if "://" in place:
        raise CheckpointWriteError(f"cannot convert into {place}: it is a URL, give a path", filename=place)
    weights_only = to == "safetensors" if weights_only is None else weights_only
    with opening.opened(source) as checkpoint:
        if os.path.realpath(checkpoint.name) == os.path.realpath(place):
            raise CheckpointWriteError(f"cannot convert {place} into itself", filename=place)
        chosen = Source(checkpoint, weights_only)
        token = token_of(chosen.identity, to)
        writer: ArchiveWriter | SafetensorsWriter
        if to == "safetensors":
            writer = SafetensorsWriter(chosen, place, token)
        else:
            writer = ArchiveWriter(chosen, place, to == "torch_dist", token)
        nbytes = sum(math.prod(saved.shape) * saved.dtype.itemsize for saved in chosen.saved())
        resumed = _write(writer, place, nbytes, progress)
        has_objects = to != "safetensors"
        return Conversion(
            source=checkpoint.name,
            destination=place,
            format=to,
            tensors=len(chosen.tensors),
            objects=len(chosen.objects) if has_objects else 0,
            nbytes=nbytes,
            left_out=tuple(chosen.left_out if has_objects else sorted(chosen.left_out + chosen.objects)),
            resumed=resumed,
        )


def _write(writer: ArchiveWriter | SafetensorsWriter, place: str, nbytes: int, progress: Progress) -> bool:
    try:
        if writer.is_done():
            if isinstance(writer, ArchiveWriter):
                writer.clean_up()
            return True
        prepare_directory(place)
        require_space(place, nbytes)
        return writer.write(progress)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointWriteError(
            f"cannot write {place}: {error.strerror or error}", error.errno, error.filename or place
        ) from error
