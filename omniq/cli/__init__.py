# SPDX-License-Identifier: Apache-2.0
"""What people type: ``omniq quantize | evaluate | export | report`` and ``lightning run``.

Commands, exit status, one-line errors. May import every other room. Read ``main.py`` first.
"""
