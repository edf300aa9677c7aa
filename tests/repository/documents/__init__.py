# SPDX-License-Identifier: Apache-2.0
"""The documentation's programs run, its diffs apply, its pictures are of the published measurements."""
