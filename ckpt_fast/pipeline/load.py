# SPDX-License-Identifier: Apache-2.0
"""Load: plan which bytes are wanted, read them where they belong, check them, place the rest."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError
from ckpt_fast.pipeline.archive import ALIGNMENT
from ckpt_fast.pipeline.checks import Checks
from ckpt_fast.pipeline.consistency import Region, missing_message
from ckpt_fast.pipeline.decode import decode_object, undo_transforms
from ckpt_fast.pipeline.garbage import without_collections
from ckpt_fast.pipeline.group import ranks_on_this_node
from ckpt_fast.pipeline.host_buffer import HostBuffer, host_buffers
from ckpt_fast.pipeline.index import CheckpointIndex, Piece, RawData, SavedTensor
from ckpt_fast.pipeline.place import Box, Destination, Reshaped, is_addressable, runs
from ckpt_fast.pipeline.read import ByteArena, ReadProgram
from ckpt_fast.pipeline.types import Extent, TensorRequest

# Less is read before it matters how.
_MIN_DIRECT_NBYTES = 32 << 20
# Host memory for what cannot be read in place; more would only delay the copies.
_LANDING_NBYTES = 512 << 20

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """One load on this rank. ``verified`` and ``unverified`` count items."""

    directory: str
    nbytes: int = 0
    seconds: float = 0.0
    verified: int = 0
    unverified: int = 0


class Part(NamedTuple):
    """A region of one piece, wanted in ``destination`` (of the region's shape)."""

    tensor: SavedTensor
    piece: Piece
    box: Box
    destination: Destination


@without_collections
def load_tensors(
    index: CheckpointIndex, requests: Sequence[TensorRequest], verify: bool | None = None
) -> LoadReport:
    """Fill every request's destination from the checkpoint. Local, no collectives.

    Args:
        index: the checkpoint.
        requests: regions wanted; a destination of another dtype is converted, on another device copied to.
        verify: compare checksums: of what is read with the manifest's, without one of every item that is
            touched, which is read whole for it; None follows ``CKPT_FAST_VERIFY``.

    Raises:
        CheckpointMismatchError: a name is missing or a region lies outside the saved tensor.
        CheckpointCorruptError: a checksum differs, a file is short, or pieces of a region are missing.
            Destinations then hold undefined values.
    """
    parts = [part for request in requests for part in _parts(index, request)]
    return load_parts(index, parts, verify)


@without_collections
def load_parts(index: CheckpointIndex, parts: Sequence[Part], verify: bool | None = None) -> LoadReport:
    """``load_tensors`` for callers that know the pieces already."""
    begin = time.perf_counter()
    verify = settings.verify_on_load() if verify is None else verify
    report = LoadReport(index.directory)
    located = index.locate((part.tensor.dtype, part.piece) for part in parts)
    _Reader(index, report, verify).read(parts, located)
    report.seconds = time.perf_counter() - begin
    logger.debug("loaded %s", report)
    return report


def load_objects(index: CheckpointIndex, fqns: Iterable[str], verify: bool | None = None) -> dict[str, Any]:
    """The values of saved objects, by name. Local, no collectives.

    Raises:
        CheckpointMismatchError: a name is missing.
        CheckpointCorruptError, UnsafeCheckpointError: see ``decode_object``.
    """
    verify = settings.verify_on_load() if verify is None else verify
    return {
        fqn: decode_object(payload, f"{fqn} in {index.directory}/{index.object_extent(fqn).path}", verify)
        for fqn, payload in load_payloads(index, fqns, verify).items()
    }


def load_payloads(
    index: CheckpointIndex, fqns: Iterable[str], verify: bool | None = None
) -> dict[str, bytes]:
    """The undecoded bytes of saved objects, by name.

    Raises:
        CheckpointMismatchError: a name is missing.
        CheckpointCorruptError: the bytes are not those that the manifest, if there is one, has checksums of.
    """
    program = ReadProgram(index.files)
    arena = ByteArena(program)
    checks = Checks(index, program, arena)
    handles = {fqn: arena.add(index.object_extent(fqn)) for fqn in fqns}
    verify = settings.verify_on_load() if verify is None else verify
    if verify and index.manifest is not None:
        for fqn in handles:
            item = index.object_extent(fqn)
            checks.add(fqn, item, index.checked(item))
    checks.compare(program.run())
    return {
        fqn: undo_transforms(arena.content(handle), index.object_transforms(fqn), index.extensions)
        for fqn, handle in handles.items()
    }


def _parts(index: CheckpointIndex, request: TensorRequest) -> list[Part]:
    tensor, destination = index.tensor(request.fqn), _destination(request)
    wanted = tuple(destination.shape)
    # Loaded as it was saved, a tensor may have thousands of pieces of which one is wanted.
    piece = index.exact_piece(request.fqn, request.offsets, wanted)
    if piece is not None:
        box = Box(piece.sizes, (0,) * len(wanted), wanted, tensor.dtype.itemsize)
        return [Part(tensor, piece, box, destination)]
    return _overlaps(tensor, wanted, request)


def _destination(request: TensorRequest) -> Destination:
    if request.sizes is None:
        return request.destination
    if request.destination.is_contiguous():
        return request.destination.view(request.sizes)
    return Reshaped(request.destination, request.sizes)


def _overlaps(tensor: SavedTensor, wanted: tuple[int, ...], request: TensorRequest) -> list[Part]:
    if len(wanted) != len(tensor.shape) or any(
        offset < 0 or offset + size > limit
        for offset, size, limit in zip(request.offsets, wanted, tensor.shape, strict=True)
    ):
        raise CheckpointMismatchError(
            f"{tensor.fqn} is saved with shape {tensor.shape}; a region of shape {wanted} at "
            f"{request.offsets} does not fit. The model differs from the one that was saved."
        )
    parts, found = [], []
    for piece in tensor.pieces:
        low = [max(a, b) for a, b in zip(request.offsets, piece.offsets, strict=True)]
        high = [
            min(a + n, b + m)
            for a, n, b, m in zip(request.offsets, wanted, piece.offsets, piece.sizes, strict=True)
        ]
        shape = tuple(b - a for a, b in zip(low, high, strict=True))
        if any(size <= 0 for size in shape):
            continue
        destination = _destination(request)
        for dimension, size in enumerate(shape):
            if size != wanted[dimension]:
                destination = destination.narrow(dimension, low[dimension] - request.offsets[dimension], size)
        start = [a - b for a, b in zip(low, piece.offsets, strict=True)]
        box = Box(piece.sizes, start, shape, tensor.dtype.itemsize)
        parts.append(Part(tensor, piece, box, destination))
        found.append(Region(tuple(a - b for a, b in zip(low, request.offsets, strict=True)), shape))
    # Pieces have no element in common.
    if sum(region.numel for region in found) != math.prod(wanted):
        raise CheckpointCorruptError(missing_message(tensor.fqn, request.offsets, wanted, found))
    return parts


def _landing_nbytes(part: Part) -> int:
    """Host memory that a part needs besides its destination, which the engine cannot read it into."""
    if not part.box.has_long_runs:
        return math.prod(part.box.rows()[1].sizes) * part.box.itemsize
    if (
        is_addressable(part.destination)
        and part.destination.dtype == part.tensor.dtype
        and part.box.fits_runs(part.destination)
    ):
        return 0
    return math.prod(part.box.shape) * part.box.itemsize


def _cut_waves(parts: Sequence[Part], limit: int) -> list[list[tuple[Part, int]]]:
    """Parts with their landing sizes, of which each wave has at most ``limit`` bytes (or is one part)."""
    waves: list[list[tuple[Part, int]]] = [[]]
    room = limit
    for part in parts:
        nbytes = -(-_landing_nbytes(part) // ALIGNMENT) * ALIGNMENT
        if nbytes > room and waves[-1]:
            waves.append([])
            room = limit
        waves[-1].append((part, nbytes))
        room -= nbytes
    return waves


class _Reader:
    """A list of parts on its way to the destinations.

    What cannot be read in place (other dtypes, other devices, strided memory) lands in a host buffer first.
    It goes in waves, so that the buffer is small whatever the parts are together.
    """

    def __init__(self, index: CheckpointIndex, report: LoadReport, verify: bool) -> None:
        self._index, self._report, self._verify = index, report, verify

    def read(self, parts: Sequence[Part], located: dict[Extent, RawData | None]) -> None:
        stock = [part for part in parts if located.get(part.piece.item) is None]
        plain = [part for part in parts if located.get(part.piece.item) is not None]
        may_be_direct = self._may_be_direct(plain, located)
        bound = settings.host_buffer_bytes()
        limit = _LANDING_NBYTES if bound is None else min(bound, _LANDING_NBYTES)
        waves = _cut_waves(plain, limit)
        nbytes = max(sum(landing for _, landing in wave) for wave in waves)
        buffer = host_buffers.take(nbytes, bound) if nbytes else None
        try:
            for wave in waves:
                _Wave(self._index, self._report, self._verify, buffer).read(wave, located, may_be_direct)
        finally:
            if buffer is not None:
                host_buffers.give_back(buffer, keep=False)
        with torch.no_grad():
            for part in stock:
                self._read_with_torch(part)

    def _may_be_direct(self, parts: Sequence[Part], located: dict[Extent, RawData | None]) -> bool:
        """Whether to read from the device past the page cache, if the bytes are not in it: that is faster.

        They are not in it afterwards either. So ranks of one machine do so only if together they read no more
        than there is: if the same bytes are for several of them, the first brings them for all.
        """
        nbytes = sum(self._read_nbytes(part, located[part.piece.item]) for part in parts)
        return (
            settings.direct_io()
            and nbytes >= _MIN_DIRECT_NBYTES
            and nbytes * ranks_on_this_node() <= self._index.nbytes
        )

    def _read_nbytes(self, part: Part, raw: RawData | None) -> int:
        """Bytes to be read for a part, with what its checksums take besides; at most, not to the byte."""
        wanted = math.prod(part.box.shape) * part.box.itemsize
        if not self._verify or raw is None or part.box.is_whole:
            return wanted
        block = max(raw.block_nbytes, 1)
        begin, end = part.box.span()
        return min(raw.extent.nbytes, -(-end // block) * block) - begin // block * block

    def _read_with_torch(self, part: Part) -> None:
        """Items that are not one stored tensor: whatever ``torch.load`` makes of them."""
        program = ReadProgram(self._index.files)
        arena = ByteArena(program)
        checks = Checks(self._index, program, arena)
        handle = arena.add(part.piece.item)
        raw = self._index.payload_of(part.piece.item)
        if self._verify and raw is not None:
            checks.add(part.tensor.fqn, part.piece.item, raw)
        checks.compare(program.run())
        where = f"{part.tensor.fqn} in {self._index.directory}/{part.piece.item.path}"
        payload = undo_transforms(arena.content(handle), part.piece.transforms, self._index.extensions)
        tensor = decode_object(payload, where, self._verify)
        if (
            not isinstance(tensor, torch.Tensor)
            or tuple(tensor.shape) != part.piece.sizes
            or tensor.dtype != part.tensor.dtype
        ):
            raise CheckpointCorruptError(
                f"{where} is not the {part.tensor.dtype} tensor of shape {part.piece.sizes} that .metadata "
                "says; load an earlier iteration"
            )
        for dimension, (start, size) in enumerate(zip(part.box.start, part.box.shape, strict=True)):
            tensor = tensor.narrow(dimension, start, size)
        part.destination.copy_(tensor)
        self._report.nbytes += len(payload)
        self._report.verified += self._verify
        self._report.unverified += not self._verify


class _Wave:
    """One pass over the files."""

    def __init__(
        self, index: CheckpointIndex, report: LoadReport, verify: bool, buffer: HostBuffer | None
    ) -> None:
        self._index, self._report, self._verify = index, report, verify
        self._buffer, self._landed = buffer, 0
        self._program = ReadProgram(index.files)
        self._checks = Checks(index, self._program, ByteArena(self._program))
        self._copies: list[tuple[Destination, torch.Tensor]] = []

    def read(
        self,
        parts: Sequence[tuple[Part, int]],
        located: dict[Extent, RawData | None],
        may_be_direct: bool,
    ) -> None:
        for part, landing_nbytes in parts:
            raw = located[part.piece.item]
            assert raw is not None
            self._schedule(part, raw, landing_nbytes)
        crcs = self._program.run(may_be_direct and self._program.is_cold())
        self._report.nbytes += self._program.nbytes
        self._checks.compare(crcs)
        with torch.no_grad():
            for destination, source in self._copies:
                destination.copy_(source, non_blocking=True)
        # The buffer is somebody else's next.
        for device in {destination.device for destination, _ in self._copies if destination.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def _schedule(self, part: Part, raw: RawData, landing_nbytes: int) -> None:
        box, destination = part.box, part.destination
        if self._verify:
            self._checks.add(part.tensor.fqn, part.piece.item, raw)
        self._report.verified += self._verify
        self._report.unverified += not self._verify
        if not box.has_long_runs:
            offset, rows = box.rows()
            nbytes = math.prod(rows.sizes) * box.itemsize
            raw = raw._replace(extent=Extent(raw.extent.path, raw.extent.offset + offset, nbytes))
            landing = self._land(rows.sizes, part.tensor.dtype, landing_nbytes)
            region = landing
            for dimension, (start, size) in enumerate(zip(rows.start, rows.shape, strict=True)):
                region = region.narrow(dimension, start, size)
            self._copies.append((destination, region))
            box, destination = Box(rows.sizes, (0,) * len(rows.sizes), rows.sizes, box.itemsize), landing
        elif landing_nbytes:
            landing = self._land(box.shape, part.tensor.dtype, landing_nbytes)
            self._copies.append((destination, landing))
            destination = landing
        if box.is_whole and isinstance(destination, torch.Tensor) and destination.is_contiguous():
            self._program.add(raw.extent, destination.data_ptr())
        else:
            self._program.add_runs(raw.extent.path, runs(box, raw.extent, destination))

    def _land(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        """Memory of the host buffer for a tensor; ``nbytes`` of it are taken."""
        if self._buffer is None:
            return torch.empty(tuple(shape), dtype=dtype)
        used = math.prod(shape) * dtype.itemsize
        memory = self._buffer.memory[self._landed : self._landed + used]
        self._landed += nbytes
        return memory.view(dtype).view(tuple(shape))
