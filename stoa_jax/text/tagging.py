"""Nouns and verbs of a text by spaCy, laid over CLIP's pieces."""

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.tagger.lemmatize import VerbLemmatizer
from stoa_jax.text.tokenizer import Piece, Tokenizer, clean

# The values of `tags`; SPEC and `objectives` count on them.
NOUN, PROPN, VERB = 1, 2, 3
_TAGS = {"NOUN": NOUN, "PROPN": PROPN, "VERB": VERB}
DEFAULT = Path(__file__).parents[1] / "tagger" / "model"
# What a pipeline may bring that costs time and sets no tag.
_UNUSED = ("parser", "ner", "senter", "sentencizer", "textcat", "entity_ruler")
_SURROGATES = re.compile("[\ud800-\udfff]")
_MAX_CHARACTERS = 1_000_000


class Word(NamedTuple):
    """A word as the tagger divides the text, and its span there."""

    word: str
    start: int
    end: int
    upos: str
    lemma: str


class Parsed(NamedTuple):
    """A text's tokens, the tag of each, its nouns, and its verbs as lemmas in order of the text.

    tags: 0 none, 1 NOUN, 2 PROPN, 3 VERB, at the last piece of the word; of the verbs with one
    lemma only the first has its tag. Words beyond the last token are in neither list.
    """

    tokens: np.ndarray  # int32 [L]
    tags: np.ndarray  # uint8 [L]
    nouns: list[str]
    verbs: list[str]


class Tagger:
    """Universal tags and lemmas by a spaCy pipeline: ours ("default"), or any installed one."""

    def __init__(self, name: str = "default"):
        try:
            import spacy
        except ImportError:
            raise UserError('tagging needs spaCy: pip install "spacy>=3.8,<3.9"') from None
        self.name = name
        path = DEFAULT if name == "default" else name
        try:
            self._nlp = spacy.load(path, exclude=list(_UNUSED))
        except (OSError, ValueError, ImportError) as error:
            if Path(path).exists():
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"tagger {name!r}: spaCy cannot load it ({reason})") from None
            raise UserError(
                f"no spaCy pipeline {name!r} is installed: "
                f"python -m spacy download {name} (or pip install it), or use tagger 'default'"
            ) from None
        self._nlp.max_length = _MAX_CHARACTERS + 1
        lemmas = DEFAULT / "lemmas.json"
        self._verb_lemma = VerbLemmatizer.from_file(lemmas)
        if not any(w.upos for w in self.tag("a dog runs")):
            raise UserError(
                f"tagger {name!r} sets no part of speech; it has {', '.join(self._nlp.pipe_names)}"
            )

    def tag(self, text: str | Sequence[str]) -> list[Word] | list[list[Word]]:
        """The words of one text, or of each of several; spans are into the text as given."""
        if isinstance(text, str):
            return next(self._words([text]))
        return list(self._words(text))

    def tag_words(
        self, texts: Sequence[tuple[list[str], list[bool]]]
    ) -> list[list[tuple[str, str]]]:
        """(tag, lemma) of each word of texts already divided into words and spaces after them."""
        from spacy.tokens import Doc

        docs = (Doc(self._nlp.vocab, words=words, spaces=spaces) for words, spaces in texts)
        return [
            [(t.pos_, t.lemma_ or self._lemma(t.text, t.pos_)) for t in doc]
            for doc in self._nlp.pipe(docs, batch_size=256)
        ]

    def _words(self, texts: Sequence[str]) -> Iterator[list[Word]]:
        # A lone surrogate has no UTF-8 and would stop spaCy; its stand-in keeps every offset.
        safe = (_SURROGATES.sub("\ufffd", t)[:_MAX_CHARACTERS] for t in texts)
        for doc in self._nlp.pipe(safe, batch_size=256):
            words = [(t.text, t.idx, t.idx + len(t), t.pos_, t.lemma_) for t in doc]
            yield [
                Word(w, a, b, u, lemma or self._lemma(w, u))
                for w, a, b, u, lemma in words
                if not w.isspace()
            ]

    def _lemma(self, word: str, upos: str) -> str:
        return self._verb_lemma(word) if upos in ("VERB", "AUX") else word.lower()


def parse(text: str, tokenizer: Tokenizer, tagger: Tagger, length: int = 77) -> Parsed:
    """Tokens, tags, nouns and verbs of one text."""
    return parse_many([text], tokenizer, tagger, length)[0]


def parse_many(
    texts: Sequence[str], tokenizer: Tokenizer, tagger: Tagger, length: int = 77
) -> list[Parsed]:
    """`parse` of each text, tagged in batches. What is tagged is the cleaned text, in its case."""
    cleaned = [clean(t) for t in texts]
    tagged = tagger.tag(cleaned)
    pairs = zip(cleaned, tagged, strict=True)
    return [_lay(text, words, tokenizer, length) for text, words in pairs]


def _lay(text: str, words: list[Word], tokenizer: Tokenizer, length: int) -> Parsed:
    """Puts the tag of each word at the piece that holds its last letter."""
    pieces = tokenizer.pieces(text)
    tokens = tokenizer.pack(pieces, length)
    tags = np.zeros(length, np.uint8)
    lowered, offsets = _lowered(text)
    starts = [p.start for p in pieces]
    first = [1, *itertools.accumulate((len(p.ids) for p in pieces), initial=1)][1:]
    nouns: list[str] = []
    verbs: list[str] = []
    for word in words:
        tag = _TAGS.get(word.upos, 0)
        if not tag:
            continue
        last = (offsets[word.end] if offsets else word.end) - 1
        at = bisect.bisect_right(starts, last) - 1
        if at < 0 or pieces[at].end <= last:
            continue  # nothing that CLIP sees
        place = first[at] + _piece_of(pieces[at], last, lowered, tokenizer)
        if place > length - 2 or tags[place]:
            continue
        lemma = word.lemma.lower()
        if tag == VERB and lemma in verbs:
            continue
        tags[place] = tag
        if tag == VERB:
            verbs.append(lemma)
        elif tag == NOUN:
            nouns.append(word.word.lower())
    return Parsed(tokens, tags, nouns, verbs)


def _lowered(text: str) -> tuple[str, list[int] | None]:
    """The text in small letters, and where each character went if the length changed."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered, None
    return lowered, [0, *itertools.accumulate(len(c.lower()) for c in text)]


def _piece_of(piece: Piece, last: int, text: str, tokenizer: Tokenizer) -> int:
    """Which of a word's pieces holds the character at `last`."""
    if last == piece.end - 1:
        return len(piece.ids) - 1
    wanted = len(text[piece.start : last + 1].encode())
    sizes = itertools.accumulate(tokenizer.piece_bytes(piece.ids))
    return bisect.bisect_left(list(sizes), wanted)
