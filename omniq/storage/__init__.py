# SPDX-License-Identifier: Apache-2.0
"""What lies on disk: the run directory, its lock, sealed files, the background writer, ``BlockResult``.

May import quantizers, grid and distributed. Read ``run_dir.py`` first.
"""
