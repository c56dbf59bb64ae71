# SPDX-License-Identifier: Apache-2.0
"""Which settings decide whether a run may be continued."""

from omniq.run.fingerprint import fingerprint


def test_fingerprint_without_compile_key_equals_compile_false() -> None:
    assert fingerprint("seed: 2\ncompile: false") == fingerprint("seed: 2")
    assert fingerprint("seed: 2\ncompile: true") != fingerprint("seed: 2")


def test_fingerprint_has_rules_unless_empty() -> None:
    assert fingerprint("scheme: {name: W4A16, rules: []}") == fingerprint("scheme: {name: W4A16}")
    assert fingerprint("scheme: {name: W3A16g16, rules: [{layers: '*.down_proj', name: W8A16}]}") != fingerprint(
        "scheme: {name: W3A16g16}"
    )
