# SPDX-License-Identifier: Apache-2.0
"""Files of a run: the run directory, its lock, sealed files, the background writer, and ``BlockResult``.

May import quantizers, grid and distributed. Read ``run_dir.py`` first.
"""
