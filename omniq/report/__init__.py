# SPDX-License-Identifier: Apache-2.0
"""What people look at: the progress display, tables.

May import evaluate and storage. Read ``table.py`` first.
"""
