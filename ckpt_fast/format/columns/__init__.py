# SPDX-License-Identifier: Apache-2.0
"""What is said of thousands of ranks' items, in columns: as it travels, checked, and as ``.metadata``."""
