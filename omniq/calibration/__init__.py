# SPDX-License-Identifier: Apache-2.0
"""The machinery that all methods share.

``Stage`` (settings), ``BlockTask`` (a block and its streams), ``BlockModule`` (the LightningModule), Gram matrices,
observation of inputs, the captured step. May import blocks and everything below. Read ``stage.py``, then ``task.py``.
"""
