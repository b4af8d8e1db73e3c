"""Generate caption-like sentences from the words of a treebank, for training the tagger.

Captions usually consist of a noun and a verb in the present tense ("a man lifts a barbell"). Such
sentences are rare in the treebank, and a tagger trained on it alone takes about every second such
verb for a plural noun. Noun phrases, verbs and adverbs of the treebank in the form of captions
teach it where the verb is.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable

from stoa_jax.tagger.treebank import Sentence

Words = list[tuple[str, str]]  # (word, universal tag)

_PREPOSITIONS = (
    "in in in on on on at with with by from to into through over under near behind against around"
    " for across along off of of"
)
_PREPOSITION_WORDS = [(w, "ADP") for w in _PREPOSITIONS.split()]
_DETERMINERS = "a a a a the the the some another his her its their two three".split()
_KINDS = {
    "two": "NUM",
    "three": "NUM",
    "his": "PRON",
    "her": "PRON",
    "its": "PRON",
    "their": "PRON",
}
_SUBJECTS = "someone he she they it people".split()
_VOWELS = "aeiou"


def third_person(verb: str) -> str:
    """Inflect a verb: walk -> walks, push -> pushes, carry -> carries."""
    if verb.endswith("y") and verb[-2:-1] not in _VOWELS:
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")


def participle(verb: str) -> str:
    """Inflect a verb: walk -> walking, take -> taking, stop -> stopping."""
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "ye", "oe")):
        return verb[:-1] + "ing"
    double = (
        len(verb) > 2
        and verb[-1] not in _VOWELS + "wxy"
        and verb[-2] in _VOWELS
        and sum(c in _VOWELS for c in verb) == 1
    )
    return verb + verb[-1] * double + "ing"


class Captions:
    """Generator of random captions from the words of a treebank."""

    def __init__(self, sentences: list[Sentence]):
        counts: dict[str, Counter] = defaultdict(Counter)
        self._phrases: list[Words] = []
        for s in sentences:
            for i, (word, tag, lemma) in enumerate(zip(s.words, s.upos, s.lemmas, strict=True)):
                if word.isalpha() and word.isascii():
                    counts[tag][(lemma if tag == "VERB" else word).lower()] += 1
                if tag == "NOUN":
                    self._add_phrase(s, i)
        # Sample by the square root of the count, so that rare words occur but common ones dominate.
        self._words: dict[str, tuple[list[str], list[float]]] = {
            t: (list(c), [n**0.5 for n in c.values()])
            for t, c in ((t, {w: n for w, n in counts[t].items() if len(w) > 1}) for t in counts)
        }
        self._keep("VERB", lambda w: w not in ("be", "have"))
        self._keep("ADV", lambda w: w.endswith("ly") or w in ("away", "together"))

    def _keep(self, tag: str, wanted: Callable[[str], bool]) -> None:
        pairs = [(w, n) for w, n in zip(*self._words[tag], strict=True) if wanted(w)]
        self._words[tag] = [w for w, _ in pairs], [n for _, n in pairs]

    def _add_phrase(self, s: Sentence, head: int) -> None:
        """Store the noun at `head` with the words before it that depend on it."""
        start = head
        while start and s.heads[start - 1] in range(start, head + 1):
            start -= 1
        words = list(zip(s.words[start : head + 1], s.upos[start : head + 1], strict=True))
        first = words[0][1]
        if 1 <= head - start <= 4 and first in ("DET", "ADJ", "NOUN", "NUM", "PRON"):
            if all(w.isalpha() for w, _ in words):
                self._phrases.append([(w.lower(), t) for w, t in words])

    def _pick(self, tag: str, rng: random.Random) -> tuple[str, str]:
        words, weights = self._words[tag]
        return rng.choices(words, weights)[0], tag

    def _noun_phrase(self, rng: random.Random) -> Words:
        if rng.random() < 0.5:
            return list(rng.choice(self._phrases))
        words = [self._pick("NOUN", rng)]
        if rng.random() < 0.2:
            words.insert(0, self._pick("NOUN", rng))
        if rng.random() < 0.25:
            words.insert(0, self._pick("ADJ", rng))
        if rng.random() < 0.9:
            det = rng.choice(_DETERMINERS)
            if det == "a" and words[0][0][0] in _VOWELS:
                det = "an"
            words.insert(0, (det, _KINDS.get(det, "DET")))
        if rng.random() < 0.1:
            words += [("and", "CCONJ"), *self._noun_phrase(rng)[:3]]
        return words

    def _verb_phrase(self, form: str, rng: random.Random, more: bool = True) -> Words:
        verb = self._pick("VERB", rng)[0]
        inflect = {"s": third_person, "ing": participle}.get(form, str)
        words: Words = [(inflect(verb), "VERB")]
        if rng.random() < 0.1:
            words.append(
                (rng.choice(["up", "down", "out", "off"]), "ADP")
            )  # the treebank's tag for a verb particle
        if rng.random() < 0.5:
            words += self._noun_phrase(rng)
        if rng.random() < 0.2:
            words.append(self._pick("ADV", rng))
        if rng.random() < 0.55:
            words += [rng.choice(_PREPOSITION_WORDS), *self._noun_phrase(rng)]
        if more and rng.random() < 0.25:
            link = rng.choice(["and", "while", "to"])
            if link == "to":
                words += [("to", "PART"), *self._verb_phrase("", rng, False)]
            elif link == "and":
                words += [("and", "CCONJ"), *self._verb_phrase(form, rng, False)]
            else:
                words += [("while", "SCONJ"), *self._verb_phrase("ing", rng, False)]
        return words

    def sample(self, rng: random.Random) -> Sentence:
        """Generate one caption."""
        subject = self._noun_phrase(rng)
        if rng.random() < 0.08:
            subject = [(rng.choice(_SUBJECTS), "PRON")]
            subject = [(w, "NOUN" if w == "people" else t) for w, t in subject]
        elif rng.random() < 0.15:
            subject += [rng.choice(_PREPOSITION_WORDS), *self._noun_phrase(rng)]
        plural = subject[-1][0].endswith("s") or subject[-1][0] in ("they", "people")
        kind = rng.choices(range(6), [45, 20, 15, 6, 6, 8])[0]
        if kind == 0:
            words = subject + self._verb_phrase("" if plural else "s", rng)
        elif kind == 1:
            be = ("are" if plural else "is", "AUX")
            words = [*subject, be, *self._verb_phrase("ing", rng)]
        elif kind == 2:
            words = subject + self._verb_phrase("ing", rng)
        elif kind == 3:
            words = self._verb_phrase("ing", rng)
        elif kind == 4:
            there: Words = [("there", "PRON"), ("are" if plural else "is", "VERB")]
            words = there + subject + self._verb_phrase("ing", rng)
        else:  # no verb at all
            words = [*subject, rng.choice(_PREPOSITION_WORDS), *self._noun_phrase(rng)]
        return _finish(words, rng)


def _finish(words: Words, rng: random.Random) -> Sentence:
    forms, tags = [w for w, _ in words], [t for _, t in words]
    if rng.random() < 0.25:
        forms[0] = forms[0].capitalize()
    spaces = [True] * len(forms)
    if rng.random() < 0.25:
        spaces[-1] = False
        forms, tags, spaces = [*forms, "."], [*tags, "PUNCT"], [*spaces, False]
    return Sentence(forms, spaces, tags, forms, [-1] * len(forms))
