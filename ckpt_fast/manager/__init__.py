# SPDX-License-Identifier: Apache-2.0
"""``CheckpointManager``: the checkpoints of a loop that saves state dicts itself. No Megatron."""
