# SPDX-License-Identifier: Apache-2.0
"""Where other frameworks come in: one file per framework, all on the same pipeline."""
