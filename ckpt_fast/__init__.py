# SPDX-License-Identifier: Apache-2.0
"""Fast, crash-safe training checkpoints in the files Megatron and torch already read."""
