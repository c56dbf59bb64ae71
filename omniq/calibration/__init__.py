# SPDX-License-Identifier: Apache-2.0
"""Shared by all methods: settings, the block with its streams, the LightningModule, and statistics of inputs.

``Stage`` holds settings, ``BlockTask`` a block and its streams, and ``BlockModule`` is the LightningModule of one fit.
``stage.py`` and ``settings.py`` do not import torch. May import blocks and everything below. Read ``stage.py`` first,
then ``task.py``.
"""
