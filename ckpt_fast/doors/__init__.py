# SPDX-License-Identifier: Apache-2.0
"""Where other frameworks come in: a folder for each framework, all on the same pipeline."""
