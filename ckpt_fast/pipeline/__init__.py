# SPDX-License-Identifier: Apache-2.0
"""Tensors to files and back: plan, stage, encode, write, commit; and locate, plan, read, decode, place.

Knows torch, knows nothing of Megatron. Start reading at ``save.py`` and ``load.py``.
"""
