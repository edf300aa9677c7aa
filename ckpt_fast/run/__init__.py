# SPDX-License-Identifier: Apache-2.0
"""A training run: what starts its script, and what it has apart from its saved state (configuration, loggers,
signals, save queue)."""
