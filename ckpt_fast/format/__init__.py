# SPDX-License-Identifier: Apache-2.0
"""The contents of checkpoint files, byte for byte. Nothing here opens a file: see ``storage``."""
