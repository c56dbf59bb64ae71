# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run as dataclasses, and the parser that makes it from YAML files and options.

May import stages, data, grid, storage. Read ``run.py`` first, then ``compose.py`` for the rule of composition and
``parse.py`` for the two passes of parsing.
"""
