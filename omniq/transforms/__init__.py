# SPDX-License-Identifier: Apache-2.0
"""Equivalences: scales and shifts that move between layers and leave the block's output unchanged.

May import kernels. Read ``equivalence.py`` first, then ``transform.py``. A new equivalence is one file in
``equivalences``.
"""
