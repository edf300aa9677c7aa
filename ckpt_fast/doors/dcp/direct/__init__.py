# SPDX-License-Identifier: Apache-2.0
"""``ckpt_fast.save``, ``async_save`` and ``load``: torch DCP's files, without its planners."""
