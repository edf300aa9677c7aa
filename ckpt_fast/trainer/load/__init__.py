# SPDX-License-Identifier: Apache-2.0
"""``load_checkpoint`` and its steps: choose, open, plan, read, restore."""
