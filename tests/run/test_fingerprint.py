# SPDX-License-Identifier: Apache-2.0
"""The settings that decide whether a run may be continued."""

import yaml

from omniq.run.fingerprint import fingerprint


def test_fingerprint_without_compile_key_equals_compile_false() -> None:
    assert fingerprint("seed: 2\ncompile: false") == fingerprint("seed: 2")
    assert fingerprint("seed: 2\ncompile: true") != fingerprint("seed: 2")


def test_fingerprint_has_rules_unless_empty() -> None:
    assert fingerprint("scheme: {name: W4A16, rules: []}") == fingerprint("scheme: {name: W4A16}")
    rules = [
        {"layers": "re:.*down_proj", "name": "W8A16g32", "symmetric": True},
        {"layers": "*.k_proj", "name": "W4A16"},
    ]
    rules.append({"layers": "model.layers.0.*.o_proj", "name": "none"})
    scheme = {"name": "W3A16g16", "rules": rules}
    assert fingerprint(yaml.safe_dump({"scheme": scheme})) != fingerprint("scheme: {name: W3A16g16}")
