# SPDX-License-Identifier: Apache-2.0
"""A run as dataclasses, and how YAML files and options become one.

May import stages, data, grid, storage. Read ``run.py`` first, then ``compose.py`` for
the rule of composition and ``parse.py`` for the two passes of parsing.
"""
