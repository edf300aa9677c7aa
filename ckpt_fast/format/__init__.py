# SPDX-License-Identifier: Apache-2.0
"""What is in the files of a checkpoint, byte for byte. Nothing here opens one: see ``storage``."""
