"""Text: CLIP's tokenizer and its cuts, nouns and verbs by spaCy, both on the same pieces."""

from stoa_jax.text.bpe import restrict
from stoa_jax.text.tagging import NOUN, PROPN, VERB, Parsed, Tagger, Word, parse, parse_many
from stoa_jax.text.tokenizer import Piece, Tokenizer, clean

__all__ = [
    "NOUN",
    "PROPN",
    "VERB",
    "Parsed",
    "Piece",
    "Tagger",
    "Tokenizer",
    "Word",
    "clean",
    "parse",
    "parse_many",
    "restrict",
]
