# SPDX-License-Identifier: Apache-2.0
"""One run in the order in which it happens.

``plan.py``, ``checks.py``, ``fingerprint.py``, ``loop.py``, ``fit.py``, ``finish.py``, ``saved.py``.
May import every room but cli. Read ``loop.py`` first.
"""
