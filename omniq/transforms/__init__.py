# SPDX-License-Identifier: Apache-2.0
"""Equivalent transformations: scales and shifts that move between layers and change nothing a block computes."""
