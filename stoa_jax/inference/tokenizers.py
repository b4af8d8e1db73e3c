"""The tokenizer of opened weights."""

from pathlib import Path

from stoa_jax.models.config import ModelConfig
from stoa_jax.text import Tokenizer


def tokenizer_for(path: Path, c: ModelConfig) -> Tokenizer:
    """Return the directory's own tokenizer, or CLIP's cut to the model's vocabulary."""
    if path.is_dir() and any(
        (path / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")
    ):
        return Tokenizer.from_directory(path, c.vocab_size)
    return Tokenizer(c.vocab_size)
