# SPDX-License-Identifier: Apache-2.0
"""Model families, and the checkpoint that omniq reads block by block.

May import transforms, storage, grid and errors; contains no quantization. Read ``family.py`` first, then ``source.py``
and ``checkpoint.py``.
"""
