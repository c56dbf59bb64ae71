# SPDX-License-Identifier: Apache-2.0
"""Hot operators: a torch reference beside a Triton version with the same signature.

May import grid only. Read ``fake_quant.py`` first.
"""
