# SPDX-License-Identifier: Apache-2.0
"""Tensors to files and back.

A save plans, stages, encodes, writes and seals (``save/save.py``); a load opens, plans, reads, decodes and
places (``load/load.py``). Knows torch, knows nothing of Megatron.
"""
