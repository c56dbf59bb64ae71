# SPDX-License-Identifier: Apache-2.0
"""The hot loops: pure functions on tensors, a readable torch version beside a fused one of the same signature."""
