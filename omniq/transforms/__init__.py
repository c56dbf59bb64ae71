# SPDX-License-Identifier: Apache-2.0
"""Equivalences: scales and shifts that move between layers and leave the output of the block unchanged.

May import kernels. Read ``equivalence.py`` first, then ``transform.py``. To add an equivalence, add a file to
``equivalences`` and its kind to ``let.py``.
"""
