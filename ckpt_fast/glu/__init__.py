# SPDX-License-Identifier: Apache-2.0
"""The row order of gated MLP weights: interleaved in memory, contiguous in a checkpoint."""
