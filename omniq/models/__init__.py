# SPDX-License-Identifier: Apache-2.0
"""What omniq knows about a model family, and how it reads a checkpoint block by block.

May import transforms, storage, grid and errors; contains no quantization. Read ``family.py`` first, then ``source.py``
and ``checkpoint.py``.
"""
