# SPDX-License-Identifier: Apache-2.0
"""nvidia-resiliency-ext's local checkpoints on the pipeline."""
