# SPDX-License-Identifier: Apache-2.0
"""``save_checkpoint`` and its steps: collect, hand to a door, publish, clean up."""
