# SPDX-License-Identifier: Apache-2.0
"""Several processes that work on one run, and the memory of the machine that they share.

May import errors only. Read ``collectives.py`` first.
"""
