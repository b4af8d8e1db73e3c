"""Text: CLIP's tokenizer, also with a smaller vocabulary, and part-of-speech tags of its tokens."""

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
