"""Part-of-speech tags by spaCy, aligned to CLIP's tokens."""

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.text.lemmatize import VerbLemmatizer
from stoa_jax.text.tokenizer import Piece, Tokenizer, clean

# The values of `tags`; data sets store them and `objectives` reads them.
NOUN, PROPN, VERB, ADJ = 1, 2, 3, 4
_TAGS = {"NOUN": NOUN, "PROPN": PROPN, "VERB": VERB, "ADJ": ADJ}
DEFAULT = Path(__file__).parents[1] / "tagger" / "model"
# Components of a pipeline that cost time and set no part of speech.
_UNUSED = ("parser", "ner", "senter", "sentencizer", "textcat", "entity_ruler")
_SURROGATES = re.compile("[\ud800-\udfff]")
_MAX_CHARACTERS = 1_000_000


class Word(NamedTuple):
    """A word of a text, as the tagger splits it, with its span in the text."""

    word: str
    start: int
    end: int
    upos: str
    lemma: str


class Parsed(NamedTuple):
    """A tokenized text with its tags, nouns, and the lemmas of its verbs in text order.

    Tags are 0 for none, 1 NOUN, 2 PROPN, 3 VERB, 4 ADJ, and are set at the last token of a word.
    If several verbs share a lemma, only the first is tagged. Truncated words are in neither list.
    """

    tokens: np.ndarray  # int32 [L]
    tags: np.ndarray  # uint8 [L]
    nouns: list[str]
    verbs: list[str]


class Tagger:
    """Tagger of universal parts of speech and lemmas, by our spaCy pipeline or an installed one."""

    def __init__(self, name: str = "default"):
        try:
            import spacy
        except ImportError:
            raise UserError("tagging texts needs spaCy: pip install spacy") from None
        self.name = name
        path = DEFAULT if name == "default" else name
        try:
            self._nlp = spacy.load(path, exclude=list(_UNUSED))
        except (OSError, ValueError, ImportError) as error:
            if Path(path).exists():
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"tagger {name!r}: spaCy cannot load it ({reason})") from None
            raise UserError(
                f"tagger {name!r}: no spaCy pipeline of this name is installed; run "
                f"python -m spacy download {name} (or pip install it), or use tagger 'default'"
            ) from None
        self._nlp.max_length = _MAX_CHARACTERS + 1
        lemmas = DEFAULT / "lemmas.json"
        self._verb_lemma = VerbLemmatizer.from_file(lemmas)
        if not any(w.upos for w in self.tag("a dog runs")):
            raise UserError(
                f"tagger {name!r} sets no part of speech; its components are "
                f"{', '.join(self._nlp.pipe_names)}; use another pipeline"
            )

    @overload
    def tag(self, text: str) -> list[Word]: ...
    @overload
    def tag(self, text: Sequence[str]) -> list[list[Word]]: ...
    def tag(self, text: str | Sequence[str]) -> list[Word] | list[list[Word]]:
        """Return the words of one text, or of each of several; spans refer to the text as given."""
        if isinstance(text, str):
            return next(self._words([text]))
        return list(self._words(text))

    def tag_words(
        self, texts: Sequence[tuple[list[str], list[bool]]]
    ) -> list[list[tuple[str, str]]]:
        """Tag texts that are already split into words, each with whether a space follows it.

        Returns the (tag, lemma) of every word.
        """
        from spacy.tokens import Doc

        docs = (Doc(self._nlp.vocab, words=words, spaces=spaces) for words, spaces in texts)
        return [
            [(t.pos_, t.lemma_ or self._lemma(t.text, t.pos_)) for t in doc]
            for doc in self._nlp.pipe(docs, batch_size=256)
        ]

    def _words(self, texts: Sequence[str]) -> Iterator[list[Word]]:
        # A lone surrogate has no UTF-8 form, and spaCy would fail. The substitute keeps offsets.
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
    """Tokenize and tag one text."""
    return parse_many([text], tokenizer, tagger, length)[0]


def parse_many(
    texts: Sequence[str], tokenizer: Tokenizer, tagger: Tagger, length: int = 77
) -> list[Parsed]:
    """Tokenize and tag several texts, which is faster than one by one.

    The tagger sees the cleaned text in its original case.
    """
    cleaned = [clean(t) for t in texts]
    tagged = tagger.tag(cleaned)
    pairs = zip(cleaned, tagged, strict=True)
    return [align_tags(text, words, tokenizer, length) for text, words in pairs]


def align_tags(text: str, words: list[Word], tokenizer: Tokenizer, length: int) -> Parsed:
    """Tokenize a text, and set the tag of each word at the token that holds its last letter."""
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
            continue  # CLIP has no token there
        position = first[at] + _token_in_piece(pieces[at], last, lowered, tokenizer)
        if position > length - 2 or tags[position]:
            continue
        lemma = word.lemma.lower()
        if tag == VERB and lemma in verbs:
            continue
        tags[position] = tag
        if tag == VERB:
            verbs.append(lemma)
        elif tag == NOUN:
            nouns.append(word.word.lower())
    return Parsed(tokens, tags, nouns, verbs)


def _lowered(text: str) -> tuple[str, list[int] | None]:
    """Lower-case a text; also return each character's new offset if the length changed."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered, None
    return lowered, [0, *itertools.accumulate(len(c.lower()) for c in text)]


def _token_in_piece(piece: Piece, last: int, text: str, tokenizer: Tokenizer) -> int:
    """Return the index of the token within a piece that holds the character at `last`."""
    if last == piece.end - 1:
        return len(piece.ids) - 1
    wanted = len(text[piece.start : last + 1].encode())
    sizes = itertools.accumulate(tokenizer.piece_bytes(piece.ids))
    return bisect.bisect_left(list(sizes), wanted)
