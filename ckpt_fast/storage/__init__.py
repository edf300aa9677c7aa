# SPDX-License-Identifier: Apache-2.0
"""Files: creation, removal and free space. This package does not know their contents."""
