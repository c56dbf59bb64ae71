# SPDX-License-Identifier: Apache-2.0
"""Distributed runs: collectives, the launcher, and the memory of the machine that processes share.

May import errors only. Read ``collectives.py`` first.
"""
