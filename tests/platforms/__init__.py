# SPDX-License-Identifier: Apache-2.0
"""macOS and Windows, as far as a process on Linux can be made to look like them."""
