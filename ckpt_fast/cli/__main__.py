# SPDX-License-Identifier: Apache-2.0
"""``python -m ckpt_fast.cli``: the command where its script is not on the path."""

import sys

from ckpt_fast.cli import main

sys.exit(main())
