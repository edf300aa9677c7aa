# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint has under which name: from the pickle in ``.metadata``, or from the table behind it."""
