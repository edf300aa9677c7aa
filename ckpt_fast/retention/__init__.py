# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay, and how others go: policies, the line of a run, deletion. No Megatron."""
