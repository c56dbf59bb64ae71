# SPDX-License-Identifier: Apache-2.0
"""How a range is chosen: min-max, searched, learned (LWC, PACT, LSQ); and fake quantization of activations.

May import kernels and grid. Read ``clipping.py`` first, then ``fake_quant_weight.py``.
"""
