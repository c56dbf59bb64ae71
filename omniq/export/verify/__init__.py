# SPDX-License-Identifier: Apache-2.0
"""Verification: reopen an export, compare every code with the optimised one, and compare logits.

Read ``checkpoint.py`` first.
"""
