# SPDX-License-Identifier: Apache-2.0
"""The LightningModule of each stage. A stage imports its module when it builds it; only these files import torch."""
