# SPDX-License-Identifier: Apache-2.0
"""Files: how they come and go, where there is room for them. What is in them is not known here."""
