"""CLIP's tokenizer, with the same ids as OpenAI's, and the span of each token in the text."""

import html
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.text import bpe

_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII)
_CACHED_WORDS = 1 << 17


class Piece(NamedTuple):
    """A word as CLIP splits a text: its token ids, and its span in `clean(text).lower()`."""

    ids: tuple[int, ...]
    start: int
    end: int


class _Shape(dict):
    """Map from any character to an ASCII one of the same kind, so that an ASCII regex can split."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = unicodedata.category(char)[0]
        if code < 128:
            shape = char
        elif char == "ſ":  # a case-insensitive regex treats the long s as an s
            shape = "s"
        elif char.isspace() or code == 0x345:  # U+0345 matches none of CLIP's classes
            shape = " "
        else:
            shape = {"L": "z", "N": "0"}.get(kind, "#")
        self[code] = shape
        return shape


_SHAPE = _Shape()


def clean(text: str) -> str:
    """Clean a caption as OpenAI does, but keep its case: fix encoding, unescape, single spaces."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else nothing to fix
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


class Tokenizer:
    """CLIP's byte-pair tokenizer; a smaller `vocab_size` uses only the first merges.

    The start and end tokens are the last two ids. `from_directory` reads the tokenizer files of a
    checkpoint.
    """

    def __init__(self, vocab_size: int = bpe.CLIP_SIZE):
        bpe.check_size(vocab_size)
        self._setup(bpe.clip_vocabulary(), vocab_size)

    @classmethod
    def from_directory(cls, directory: str | Path, vocab_size: int | None = None) -> "Tokenizer":
        """Load the tokenizer of a Hugging Face CLIP directory."""
        vocabulary = bpe.read_directory(directory)
        self = cls.__new__(cls)
        self._setup(vocabulary, vocab_size or vocabulary.size)
        return self

    def _setup(self, vocabulary: bpe.Vocabulary, size: int) -> None:
        self.vocab_size, self.start, self.end = size, size - 2, size - 1
        self._vocabulary = vocabulary
        self._splits = vocabulary.splits(size) if size != vocabulary.size else None
        self._cache: dict[str, tuple[int, ...]] = {}
        self._fast = None
        if vocabulary is bpe.clip_vocabulary():
            try:
                import instant_clip_tokenizer

                self._fast = instant_clip_tokenizer.Tokenizer().encode  # pyright: ignore[reportAttributeAccessIssue]  (its stubs lack it)
            except ImportError:  # no wheel for this Python: the same merges, in Python
                pass

    @property
    def merges(self) -> np.ndarray:
        """The pairs of ids that become one id each, in rank order, [merges, 2]."""
        return self._vocabulary.merges[: self.vocab_size - bpe.BASE - 2]

    def _ids(self, word: str) -> tuple[int, ...]:
        ids = self._cache.get(word)
        if ids is None:
            # The fast tokenizer splits words of some scripts differently, so it gets ASCII only.
            fast = self._fast if word.isascii() else None
            whole = fast(word) if fast else self._vocabulary.bpe(word)
            if self._splits is not None:
                offsets, flat = self._splits
                whole = [i for w in whole for i in flat[offsets[w] : offsets[w + 1]].tolist()]
            ids = tuple(whole)
            if len(self._cache) >= _CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def pieces(self, text: str) -> list[Piece]:
        """Split a text into words as CLIP does; `<|startoftext|>` in a text is ordinary text."""
        text = clean(text).lower()
        shape = text if text.isascii() else text.translate(_SHAPE)
        return [Piece(self._ids(text[slice(*m.span())]), *m.span()) for m in _WORD.finditer(shape)]

    def encode(self, text: str, length: int = 77) -> np.ndarray:
        """Encode a text as int32 [length]: start, ids, end, zeros. Truncation keeps the end."""
        return self.pack(self.pieces(text), length)

    def pack(self, pieces: Iterable[Piece], length: int = 77) -> np.ndarray:
        """Turn the pieces of a text into a row of tokens, int32 [length]."""
        if length < 2:
            raise UserError(
                f"text length {length}: it must be at least 2, for the start and end tokens"
            )
        ids: list[int] = []
        for piece in pieces:
            ids.extend(piece.ids)
            if len(ids) >= length - 2:
                break
        tokens = np.zeros(length, np.int32)
        ids = [self.start, *ids[: length - 2], self.end]
        tokens[: len(ids)] = ids
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids up to the end token; every word is followed by a space."""
        strings, out = self._vocabulary.strings, []
        for i in np.asarray(ids).ravel().tolist():
            if i == self.end:
                break
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token {i} is outside the vocabulary of {self.vocab_size}")
            if i != self.start:
                out.append(strings[i])
        return b"".join(out).decode("utf-8", "replace")

    def piece_bytes(self, ids: Iterable[int]) -> list[int]:
        """Return how many bytes of its word each token covers."""
        strings = self._vocabulary.strings
        return [len(strings[i]) - (strings[i][-1:] == b" " and len(strings[i]) > 1) for i in ids]
