# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints of all kinds, through every reader."""
