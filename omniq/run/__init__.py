# SPDX-License-Identifier: Apache-2.0
"""The steps of a run, in the order in which they happen.

``plan.py``, ``checks.py``, ``fingerprint.py``, ``loop.py``, ``fit.py``, ``finish.py``, ``saved.py``.
May import every room but cli. Read ``loop.py`` first.
"""
