# SPDX-License-Identifier: Apache-2.0
"""Host and GPU memory: buffers, copies, strided tensors. Nothing here knows what is saved."""
