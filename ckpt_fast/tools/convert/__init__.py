# SPDX-License-Identifier: Apache-2.0
"""A checkpoint written anew in another format: in bounded memory, and in steps that a crash may end."""

from ckpt_fast.tools.convert.convert import Conversion, convert

__all__ = ["Conversion", "convert"]
