# SPDX-License-Identifier: Apache-2.0
"""Containers: how a whole model is laid out on disk.

Read ``container.py`` first, then ``huggingface.py``.
"""
