# SPDX-License-Identifier: Apache-2.0
"""Hot operators: for each kernel a torch reference beside a Triton implementation with the same signature.

``fused.py`` chooses between the two. May import grid only. Read ``fake_quant.py`` first.
"""
