# SPDX-License-Identifier: Apache-2.0
"""Output for people: the progress display and tables.

May import evaluate and storage. Read ``table.py`` first.
"""
