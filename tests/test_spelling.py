# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The project's text is in American English."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEMS = ("penal", "recogn", "normal", "initial", "minim", "maxim", "optim", "analy")  # with s, or z in American
BRITISH = re.compile(
    rf"(?<![a-z])(?:(?:un|re)?label{'l'}(?:ed|ing)|(?:re)?model{'l'}(?:ed|ing)|gr{'e'}y|lic{'enc'}e"
    r"|(?:milli|centi)?met[r]es?|cent[r]e[sd]?|(?:behavi|col|neighb|fav)[o]ur\w*"
    rf"|(?:de|un|re|pre)?(?:{'|'.join(STEMS)})i?[s](?:e[drs]?|ing|ations?))(?![a-z])",
    re.IGNORECASE,
)
ALLOWED = ('"licen' + 'ce": "CC0-1.0"', 'index["licen' + 'ce"]')  # a field of the Decathlon's dataset.json


@pytest.mark.parametrize("word", ["Penali" + "se", "analy" + "sed", "unlabel" + "led", "to_cent" + "re", "gre" + "y"])
def test_a_word_is_found(word: str) -> None:
    assert BRITISH.search(f"a {word}, b")


@pytest.mark.parametrize("word", ["penalize", "labeled", "recreate", "optimistic", "metric", "analysis", "meter"])
def test_another_word_is_not(word: str) -> None:
    assert not BRITISH.search(word)


def test_words_are_american() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not in a checkout")
    found = []
    for name in listed.stdout.splitlines():
        if name.endswith(".png") or not (ROOT / name).is_file():
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        for allowed in ALLOWED:
            text = text.replace(allowed, "")
        found += [f"{name}: {word[0]}" for word in BRITISH.finditer(text)]
    assert found == []
