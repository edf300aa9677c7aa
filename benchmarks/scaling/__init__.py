# SPDX-License-Identifier: Apache-2.0
"""The coordinator of many ranks, which are simulated."""
