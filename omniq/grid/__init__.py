# SPDX-License-Identifier: Apache-2.0
"""Number formats: the affine grid, quantized scales, and schemes.

The lowest layer of the package; it imports ``omniq.errors`` only. Read ``affine.py`` first.
"""
