# SPDX-License-Identifier: Apache-2.0
"""One transformers block, made to run and to compute as exported.

Forward passes, activation streams and where they live, quantized weights, activation hooks, prefetching.
May import models, storage, quantizers, grid, distributed. Read ``forward.py`` first.
"""
