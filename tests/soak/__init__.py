# SPDX-License-Identifier: Apache-2.0
"""Hours of saves, loads, faults and structure changes: values stay right, and resources flat."""
