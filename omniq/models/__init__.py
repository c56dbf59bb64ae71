# SPDX-License-Identifier: Apache-2.0
"""What omniq knows of each model family, and checkpoints opened block by block. Nothing here knows of quantization."""
