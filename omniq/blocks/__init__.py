# SPDX-License-Identifier: Apache-2.0
"""Operations on one transformers block, so that it runs alone and computes as the exported model does.

Forward passes, activation streams and where they live, quantized weights, activation hooks, prefetching.
May import models, storage, quantizers, grid, distributed. Read ``forward.py`` first.
"""
