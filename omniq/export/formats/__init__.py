# SPDX-License-Identifier: Apache-2.0
"""Codecs: how one linear is laid out in a checkpoint. One file a codec.

A codec rearranges bits and never rounds. Read ``codec.py`` first.
"""
