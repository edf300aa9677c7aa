# SPDX-License-Identifier: Apache-2.0
"""What is saved and restored: the homes of the documented names, and of what managers are given."""
