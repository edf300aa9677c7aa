# SPDX-License-Identifier: Apache-2.0
"""What is done with checkpoints outside of training: looked at, compared, listed, converted, measured.

The command ``ckpt-fast`` prints what the functions here return. None of them is collective, and none runs
code that a checkpoint brings along.
"""
