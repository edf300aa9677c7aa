# SPDX-License-Identifier: Apache-2.0
"""``torchrun ... -m ckpt_fast.run SCRIPT``: the script, with ckpt_fast installed."""

import sys

from ckpt_fast.run.script import run

run(sys.argv[1:])
