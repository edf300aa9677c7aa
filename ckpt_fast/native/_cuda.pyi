# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels behind raw device pointers, sizes and a stream (``torch.cuda.current_stream().cuda_stream``).

Importing the module needs no driver. A CUDA failure raises RuntimeError with the call and CUDA's
description of it. A column that is not a buffer of signed 64-bit integers raises TypeError.
"""

from array import array

cuda_version: int
"""Release of CUDA it was compiled with, as CUDA counts: 13020 is 13.2."""

def device_count() -> int:
    """GPUs that the driver shows; 0 when there is no driver."""

def copy_to_host(
    destination: array[int], source: array[int], nbytes: array[int], device: int, stream: int
) -> None:
    """Copy contiguous device memory to host memory, one entry of each column per copy; enqueued.

    Returns at once if the host memory is page-locked. The caller keeps both sides alive until the stream has
    passed the work.

    Raises:
        ValueError: the columns differ in length, or a size is negative; nothing was enqueued.
        RuntimeError: CUDA refused a copy.
    """

def gather(destination: array[int], source: array[int], nbytes: array[int], device: int, stream: int) -> None:
    """As ``copy_to_host``, by kernels, hundreds of copies in one launch, to memory the device can write."""

def copy_rows(
    destination: int,
    destination_pitch: int,
    source: int,
    source_pitch: int,
    row_nbytes: int,
    rows: int,
    device: int,
    stream: int,
) -> None:
    """Copy rows that begin a pitch apart, without a kernel: enqueued on ``stream``, returns at once.

    Either side may be device memory, pinned host memory or a peer's memory. The caller keeps both alive until
    the stream has passed the work.

    Raises:
        ValueError: a size is negative, or a pitch is less than a row or 2 GiB and more.
        RuntimeError: CUDA refused the copy.
    """

def permute_rows(
    destination: array[int],
    source: array[int],
    rows: array[int],
    row_nbytes: array[int],
    block: array[int],
    interleave: bool,
    device: int,
    stream: int,
) -> None:
    """``_engine.permute_rows`` on memory the device can reach, many matrices in one launch.

    It is enqueued on ``stream`` and returns at once. Addresses may be device memory, pinned host memory or a
    peer's memory, of any alignment. The caller keeps them alive until the stream has passed the work.

    Raises:
        ValueError: some ``rows`` is not a multiple of ``2 * block``, ``block < 1``, a matrix overlaps its
            result, or the columns differ in length; nothing was enqueued.
        RuntimeError: CUDA refused the launch.
    """
