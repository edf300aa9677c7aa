# SPDX-License-Identifier: Apache-2.0
"""Tests of ``ckpt_fast.save``, ``async_save`` and ``load``."""
