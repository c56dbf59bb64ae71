# SPDX-License-Identifier: Apache-2.0
"""What a number format is: the affine grid, quantized scales, schemes.

The ground floor; imports errors only. Read ``affine.py`` first.
"""
