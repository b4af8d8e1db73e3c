"""Lemmatize English verbs with a table counted in a treebank, and with spelling rules.

spaCy's own rules need an extra data package that some package indexes lack.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

_VOWELS = "aeiou"


class VerbLemmatizer:
    """Map from a verb form to its infinitive.

    `forms` holds irregular forms (`went` -> `go`). `verbs` holds known infinitives, which decide
    between two that the spelling allows (`hoping`: hope, `singing`: sing).
    """

    def __init__(self, forms: Mapping[str, str], verbs: Collection[str]):
        self.forms = forms
        self.verbs = frozenset(verbs)

    @classmethod
    def from_file(cls, path: Path) -> "VerbLemmatizer":
        """Load the `lemmas.json` that the trainer writes."""
        table = json.loads(path.read_text(encoding="utf-8"))
        return cls(table["forms"], table["verbs"])

    def __call__(self, word: str) -> str:
        """Return the lemma in lower case; a word without a verb ending is returned unchanged."""
        word = word.lower().replace("’", "'")
        if word in self.forms:
            return self.forms[word]
        if word in self.verbs or len(word) < 4 or not word.isascii():
            return word
        if word.endswith("in'"):
            return self(word[:-1] + "g")
        # A verb with a prefix ("outran") inflects like the verb without it ("ran").
        for prefix in ("re", "un", "out", "over", "under", "mis", "fore"):
            rest = word.removeprefix(prefix)
            if rest != word and rest in self.forms and len(rest) > 2:
                return prefix + self.forms[rest]
        if word.endswith("ing") and any(v in word[:-3] for v in _VOWELS + "y"):
            return self._stem(word[:-3])
        if word.endswith("ied"):
            return word[:-3] + "y" if len(word) > 4 else word[:-1]
        if word.endswith("ed") and any(v in word[:-2] for v in _VOWELS + "y"):
            return self._stem(word[:-2])
        if word.endswith("s") and not word.endswith("ss"):
            return self._third_person(word)
        return word

    def _third_person(self, word: str) -> str:
        if word.endswith("ies"):
            return word[:-3] + "y" if len(word) > 4 else word[:-1]
        if word.endswith("es"):
            if word[:-1] in self.verbs:
                return word[:-1]
            if word[:-2] in self.verbs or word[:-2].endswith(("ss", "x", "zz", "ch", "sh", "o")):
                return word[:-2]
        return word[:-1]

    def _stem(self, stem: str) -> str:
        """Turn a form without its -ing or -ed into the infinitive: restore `e`, undo doubling."""
        if len(stem) == 2 and stem.endswith("y"):  # lying, tying
            return stem[:-1] + "ie"
        if len(stem) > 2 and stem[-1] == stem[-2] and stem[-1] not in _VOWELS:
            if stem in self.verbs:  # passing, filling
                return stem
            one = stem[:-1]
            if one in self.verbs or stem[-1] not in "lszf" or _syllables(one) > 1:
                return one
            return stem
        with_e = stem + "e"
        if with_e in self.verbs and stem in self.verbs:
            return with_e if _short(stem) else stem  # hoping, but singing
        if with_e in self.verbs or stem in self.verbs:
            return with_e if with_e in self.verbs else stem
        return with_e if _wants_e(stem) else stem


def _syllables(stem: str) -> int:
    """Count the groups of vowels."""
    groups = "".join(c if c in _VOWELS + "y" else " " for c in stem).split()
    return len(groups)


def _short(stem: str) -> bool:
    """Return whether the stem has one vowel between consonants, as in hop or skat."""
    return (
        len(stem) > 2
        and _syllables(stem) == 1
        and stem[-1] not in _VOWELS + "wxy"
        and stem[-2] in _VOWELS
        and stem[-3] not in _VOWELS
    )


def _wants_e(stem: str) -> bool:
    """Return whether the infinitive of an unknown verb probably ends in `e`."""
    if _short(stem):
        return True
    if stem.endswith(("c", "v", "u", "dg", "rg")) or stem.endswith(("at", "ur", "ir")):
        return not stem.endswith(("eat", "oat", "our", "air", "oir"))
    if stem[-1] in "sz":
        return stem[-2:-1] not in ("s", "z")
    return stem[-1] == "l" and len(stem) > 2 and stem[-2] not in _VOWELS + "lrwy"
