# SPDX-License-Identifier: Apache-2.0
"""The affine grid, and the ways to choose the range that it covers."""
