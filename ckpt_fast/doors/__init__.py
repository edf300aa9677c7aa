# SPDX-License-Identifier: Apache-2.0
"""The entry points for other frameworks: a folder for each framework, all on the same pipeline."""
