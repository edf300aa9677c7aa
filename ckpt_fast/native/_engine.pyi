# SPDX-License-Identifier: Apache-2.0
"""The engine: bytes in, bytes out. It knows addresses, sizes and files; no tensors.

Addresses are plain integers (``tensor.data_ptr()``); the caller keeps the memory alive. Every call that
moves bytes releases the GIL. Columns are buffers of signed 64-bit integers (``array.array("q")``), one
entry per file, piece, extent or series, so that ten thousand of them cost one call.
"""

import weakref
from array import array
from collections.abc import Sequence
from typing import Any

def crc32(address: int, nbytes: int, seed: int = 0) -> int:
    """CRC-32 (zlib's polynomial and conventions) of memory; ``seed`` continues an earlier CRC."""

def crc32_combine(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of A followed by B, from the CRC of each and B's length."""

def copy_crc32(destination: int, source: int, nbytes: int, seed: int = 0) -> int:
    """Copy ``nbytes`` and return the CRC-32 of them, touching each byte once."""

def copy_runs(
    destination: array[int],
    source: array[int],
    nbytes: array[int],
    run_count: array[int],
    pitch: array[int],
    threads: int,
) -> None:
    """Copy series of runs (contiguous byte ranges), in parallel.

    Series i consists of ``run_count[i]`` runs of ``nbytes[i]`` bytes that begin ``pitch[i]`` bytes apart at
    address ``source[i]`` (a pitch of 0 repeats one run). They are packed at ``destination[i]``. Destinations
    overlap neither each other nor a source. Large copies bypass the caches.
    """

class Progress:
    """Lets another thread watch a call of ``write_files`` or ``read_extents``, and cancel it."""

    @property
    def nbytes(self) -> int:
        """Bytes written or read so far, over all calls that were given this object."""

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called."""

    @property
    def renaming(self) -> bool:
        """Whether a rename is under way. If none is after ``stop``, none will come."""

    def stop(self) -> None:
        """Calls in progress, and later ones, fail with ECANCELED before they open, move or rename more."""

    def begin_rename(self) -> bool:
        """Asked before each rename, which ends with ``end_rename``; False, and no rename, once stopped."""

    def end_rename(self) -> None:
        """The rename has ended, in whatever way."""

class Supply:
    """Bytes that come while ``write_files`` writes them, in batches. For one call; threads share it."""

    def __init__(self, batch_nbytes: array[int]) -> None:
        """``batch_nbytes[b]`` is what the pieces of batch ``b`` have in all."""

    def arrive(self, count: int) -> None:
        """The first ``count`` batches are in memory."""

    def wait_written(self, batch: int, timeout_s: float) -> bool:
        """Wait until batches 0 to ``batch`` are written; False if they are not by then, or will not be."""

    @property
    def ended(self) -> bool:
        """Whether ``end`` was called, or the write has failed."""

    def end(self) -> None:
        """Nothing more comes, or is written: whoever waits is told so."""

def write_files(
    paths: Sequence[str],
    *,
    file_nbytes: array[int],
    piece_file: array[int],
    piece_offset: array[int],
    piece_nbytes: array[int],
    piece_address: array[int],
    piece_digest: array[int],
    patch_file: array[int],
    patch_offset: array[int],
    patch_digest: array[int],
    digest_count: int,
    threads: int,
    chunk_bytes: int,
    direct: bool,
    fsync: bool,
    progress: Progress | None = None,
    block_bytes: int = 0,
    piece_batch: array[int] | None = None,
    supply: Supply | None = None,
) -> tuple[list[int], list[int], bytes]:
    """Create files and fill them from memory, in parallel; return when they are written.

    Each is written under a name of its own, ``.NAME.<8 hex digits>.partial`` beside its path. When all are
    whole, and synced with ``fsync``, they are renamed, one after the other; the directory is the caller's to
    sync. After an error the partial files are gone.

    A file is the concatenation of its pieces at their offsets; bytes no piece covers are zero. Pieces are
    ordered by (file, offset) and do not overlap. The bytes of all pieces with digest ``d >= 0``, taken in
    order, form stream ``d`` (all of it in one file); pieces with digest -1 belong to none. A patch stores
    the finished CRC-32 of its stream, 4 bytes little-endian, at a file offset that lies behind the stream's
    last byte in the same file, over the bytes a piece put there. Past the page cache (``direct``), where a
    thread spends its time waiting for the device, there are three threads for each of ``threads``.

    With a ``supply``, the bytes of a piece are read only when its ``piece_batch`` has arrived (-1: at any
    time), and not again when that is written. ``threads`` files are written at a time, in the order of
    ``paths``, each by ``chunk_bytes`` in the order of offsets; batches have to come in this order, or both
    sides wait forever.

    Returns:
        (CRC-32 of every stream, CRC-32 of every whole file, CRC-32s of blocks). The last are unsigned 32-bit
        numbers in the machine's order: one for every ``block_bytes`` of stream 0, its last block may be
        shorter, then those of stream 1, and so on; none if ``block_bytes`` is 0.

    Raises:
        OSError: with errno, and "write 4194304 bytes at 12288 to PATH: No space left on device" as text;
            ``filename`` is the path. The first failure of the pool wins. "write PATH: Operation canceled"
            after ``progress.stop()``, or if the supply ends before all has come.
    """

def read_extents(
    paths: Sequence[str],
    *,
    extent_file: array[int],
    extent_offset: array[int],
    extent_nbytes: array[int],
    extent_address: array[int],
    range_file: array[int],
    range_offset: array[int],
    range_nbytes: array[int],
    range_block: array[int],
    threads: int,
    chunk_bytes: int,
    direct: bool,
    progress: Progress | None = None,
) -> bytes:
    """Read byte ranges of files (extents) into memory, in parallel, and compute checksums on the way.

    A checked range divides into blocks of ``range_block`` bytes, of which the last may be shorter. A block of
    which an extent wants any byte is read whole, once, and what is delivered is what its checksum is of.
    Checked ranges do not overlap each other; extents may.

    Returns:
        Signed 64-bit numbers in the machine's order: the CRC-32 of every block of range 0, then of range 1,
        and so on; -1 for a block of which nothing is wanted, which is not read.

    Raises:
        OSError: as ``write_files``; a file that ends early is errno EIO with "read N bytes at OFFSET from
            PATH: file ends at SIZE", and so is "open PATH: it is a FIFO, not a regular file". The former is
            also said of a block that is wanted and that its file does not hold, and of the range with which
            more than 2 ** 20 blocks lie behind the ends of their files. Memory and time never follow from a
            length that no file has.
    """

def permute_rows(
    destination: array[int],
    source: array[int],
    rows: array[int],
    row_nbytes: array[int],
    block: array[int],
    interleave: bool,
    threads: int,
) -> None:
    """Reorder the rows of matrices between [W, V] and blocks [W0:k, V0:k, Wk:2k, Vk:2k, ...], k = ``block``.

    One entry of each column per matrix. ``rows`` is a multiple of ``2 * block``; sources and destinations do
    not overlap. ``interleave`` goes from [W, V] to blocks, otherwise back.
    """

def check_pickle(content: bytes | memoryview, archive: bool = False) -> int:
    """Follow a pickle without making anything, to see that it may be given to an unpickler.

    It may if all its arguments lie inside ``content``, its opcodes are those that plain data needs, the
    unpickler's memo does not grow beyond the bytes there are, nothing is nested deeper than 256 or contains
    itself, no call makes as many bytes or elements as a number says, and all of it, with what is shared
    repeated, has at most 64 values for each byte (and 100 000). Time and memory of unpickling, hashing and
    comparing then stay in proportion to its length.

    Args:
        content: begins with the pickle; anything after its STOP is ignored.
        archive: also allow what the pickles in archives of ``torch.save`` need and ``.metadata`` does not.

    Returns:
        The position behind STOP.

    Raises:
        ValueError: "opcode 0x72 at 17: ...".
    """

def cpu_features() -> list[str]:
    """Instruction sets in use, for ``ckpt-fast doctor`` and benchmark headers, e.g. ["pclmul", "avx512"]."""

def describe_tensors(
    values: list[Any], types: tuple[type, ...], layout: object
) -> tuple[bytearray, bytearray, list[tuple[Any, ...]]]:
    """Where the memory of torch tensors is, and what form it has; nothing of it is read.

    Args:
        values: tensors, and anything else.
        types: that are described, subclasses not.
        layout: ``torch.strided``; tensors of another one are not described.

    Returns:
        Forms and addresses, as signed 64-bit integers, one for each value, and the table of forms: (dtype,
        shape, stride, number of the device or -1, is on the CPU, is on the meta device, has a conjugate or
        negative bit, its storage has all its elements). A value is not described by -1 and 0.
    """

def refer_to(references: list[weakref.ref[Any]], objects: list[Any]) -> bool:
    """Whether each weak reference is to the object in its place, and there are as many of both.

    Raises:
        TypeError: one is no weak reference.
    """

def walk_modules(roots: Sequence[object]) -> tuple[list[Any], list[Any], bytes]:
    """torch modules below the given ones, the tensors registered with them, and the names of both.

    Depth first, in the order of registration; what is registered twice comes twice. The bytes tell apart
    trees of different names, of different kinds of tensors (parameter, buffer, None), and numbers of
    ``state_dict`` hooks and buffers that are not persistent.

    Raises:
        TypeError: something there is no torch module, or keeps its parts otherwise.
        RecursionError: a module contains itself.
    """

def walk_optimizer(
    groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]], tensor: type
) -> tuple[list[Any], bytes]:
    """The parameters of a torch optimizer, each before the tensors of its state, and what there is of both.

    Args:
        groups: its ``param_groups``.
        state: its ``state``.
        tensor: ``torch.Tensor``; what else a state holds is left out.

    Returns:
        The tensors, in order, and bytes that tell apart numbers of groups and of their parameters, which
        parameters have a state, and the names in those.

    Raises:
        TypeError: they are not built as torch's are.
        KeyError: a group has no ``params``.
    """
