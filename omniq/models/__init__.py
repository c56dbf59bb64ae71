# SPDX-License-Identifier: Apache-2.0
"""What omniq knows of a model family, and how it reads a checkpoint block by block.

May import storage and errors; knows nothing of quantization. Read ``family.py`` first, then ``source.py``.
"""
