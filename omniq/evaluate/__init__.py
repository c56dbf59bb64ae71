# SPDX-License-Identifier: Apache-2.0
"""Evaluation: the quality of a quantized model, measured independently of the stages that made it.

Read ``perplexity.py`` first. ``result.py`` does not import torch, so that ``omniq report`` starts fast.
"""
