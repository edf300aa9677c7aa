# SPDX-License-Identifier: Apache-2.0
"""The one reader of pickled objects. It builds data of known kinds, and runs no code for others."""
