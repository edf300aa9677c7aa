# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels behind raw device pointers, sizes and a stream (``torch.cuda.current_stream().cuda_stream``)."""

def device_count() -> int:
    """GPUs that the driver shows; 0 when there is no driver."""

def permute_rows(
    destination: int,
    source: int,
    rows: int,
    row_nbytes: int,
    block: int,
    interleave: bool,
    device: int,
    stream: int,
) -> None:
    """``_engine.permute_rows`` on device memory: enqueued on ``stream``, returns at once."""
