"""CLIP's byte-pair vocabulary, and smaller vocabularies with only its first merges.

The ids are, in this order: 256 bytes, the same 256 bytes at the end of a word, one id per merge in
rank order, the start token, the end token.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stoa_jax.errors import UserError

BASE = 512  # number of byte ids, within words and at the end of words
CLIP_SIZE = 49408

# CLIP numbers the printable bytes of Latin-1 first, then all others.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = _PRINTABLE + [b for b in range(256) if b not in _PRINTABLE]


class Vocabulary:
    """A byte-pair vocabulary; row i of `merges` [M, 2] is the pair of ids that forms id 512 + i."""

    def __init__(self, merges: np.ndarray):
        self.merges = merges
        self.size = BASE + len(merges) + 2
        self.start, self.end = self.size - 2, self.size - 1

    @functools.cached_property
    def strings(self) -> list[bytes]:
        """The bytes of each id except start and end; an id that ends a word ends in a space."""
        out = [bytes([b]) for b in BYTES] + [bytes([b, 32]) for b in BYTES]
        for left, right in self.merges.tolist():
            out.append(out[left] + out[right])
        return out

    @functools.cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:
        return {(a, b): BASE + i for i, (a, b) in enumerate(self.merges.tolist())}

    def bpe(self, word: str) -> list[int]:
        """Encode one word: merge the pair of lowest rank until no pair can be merged."""
        ids = [_ID_OF_BYTE[b] for b in word.encode()]
        ids[-1] += 256
        while len(ids) > 1:
            merged = min(self._ranks.get(p, self.size) for p in itertools.pairwise(ids))
            if merged == self.size:
                break
            left, right = self.merges[merged - BASE].tolist()
            out: list[int] = []
            for i in ids:
                if out and out[-1] == left and i == right:
                    out[-1] = merged
                else:
                    out.append(i)
            ids = out
        return ids

    def cut(self, size: int) -> "Vocabulary":
        """Return the vocabulary of `size` ids that keeps only the first merges."""
        check_size(size, self.size)
        return Vocabulary(self.merges[: size - 2 - BASE])

    @functools.lru_cache(maxsize=8)  # noqa: B019  (vocabularies are few and never freed)
    def splits(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Map every id to its ids in the vocabulary of `size`: (offsets [V+1], ids [sum])."""
        check_size(size, self.size)
        parts: list[tuple[int, ...]] = [(i,) for i in range(size - 2)]
        for left, right in self.merges[size - 2 - BASE :].tolist():
            parts.append(parts[left] + parts[right])
        parts += [(size - 2,), (size - 1,)]
        offsets = np.cumsum([0] + [len(p) for p in parts])
        return offsets, np.fromiter((i for p in parts for i in p), np.int32, offsets[-1])


_ID_OF_BYTE = {b: i for i, b in enumerate(BYTES)}


def check_size(size: int, largest: int = CLIP_SIZE) -> None:
    """Raise UserError unless a vocabulary of `largest` ids can be reduced to `size`."""
    if not BASE + 2 <= size <= largest:
        raise UserError(
            f"vocabulary of {size}: CLIP's can be reduced to between {BASE + 2} and {largest} ids"
        )


@functools.cache
def clip_vocabulary() -> Vocabulary:
    """Load CLIP's own vocabulary from the table beside this file."""
    with np.load(Path(__file__).with_name("clip_merges.npz")) as table:
        return Vocabulary(table["merges"].astype(np.int32))


def restrict(
    tokens: np.ndarray, tags: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Convert tokens [..., L] and their tags [..., L] from CLIP's vocabulary to a smaller one.

    The result is exactly what BPE with only the first merges gives, because merges apply in rank
    order and the later ones can be undone. A text that becomes longer than L is truncated and keeps
    its end token. The tag of a split token goes to its last part.
    """
    tokens, tags = np.asarray(tokens), np.asarray(tags)
    vocabulary = clip_vocabulary()
    offsets, ids = vocabulary.splits(vocab_size)
    shape, length = tokens.shape, tokens.shape[-1]
    flat, flat_tags = tokens.reshape(-1, length), tags.reshape(-1, length)
    counts = np.diff(offsets)[flat]
    stops = np.cumsum(counts, 1)  # [n, L]: where the parts of each token end
    repeats = counts.ravel()
    first = np.cumsum(repeats) - repeats
    part = np.arange(repeats.sum()) - np.repeat(first, repeats)
    row = np.repeat(np.repeat(np.arange(len(flat)), length), repeats)
    column = np.repeat((stops - counts).ravel(), repeats) + part
    fits = column < length
    out = np.zeros_like(flat)
    out[row[fits], column[fits]] = ids[np.repeat(offsets[flat.ravel()], repeats) + part][fits]
    out_tags = np.zeros_like(flat_tags)
    kept = stops <= length
    out_tags[np.nonzero(kept)[0], stops[kept] - 1] = flat_tags[kept]
    cut = (flat == vocabulary.end).any(1) & ~(out == vocab_size - 1).any(1)
    out[cut, -1], out_tags[cut, -1] = vocab_size - 1, 0
    return out.reshape(shape), out_tags.reshape(shape)


def read_directory(directory: str | Path) -> Vocabulary:
    """Read the vocabulary of a Hugging Face CLIP directory.

    It is in `tokenizer.json`, or in `vocab.json` and `merges.txt`.
    """
    directory = Path(directory)
    one, two = directory / "tokenizer.json", directory / "vocab.json"
    if one.is_file():
        model = _json(one).get("model", {})
        return _vocabulary(one, model.get("vocab"), model.get("merges"))
    if not two.is_file() or not (directory / "merges.txt").is_file():
        raise UserError(
            f"{directory}: contains neither tokenizer.json nor vocab.json and merges.txt; name a "
            "Hugging Face CLIP directory"
        )
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    return _vocabulary(two, _json(two), merges)


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _vocabulary(path: Path, vocab: object, merges: object) -> Vocabulary:
    """Build the vocabulary, after checking that its ids are in CLIP's order."""
    if not isinstance(vocab, dict) or not isinstance(merges, Sequence) or not vocab:
        raise UserError(
            f"{path}: has no BPE model with `vocab` and `merges`; is it CLIP's tokenizer?"
        )
    pairs = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges]
    wrong = next((m for m in pairs if len(m) != 2 or {*m, "".join(m)} - vocab.keys()), None)
    if wrong:
        raise UserError(f"{path}: the merge {' '.join(wrong)!r} is not in the vocabulary")
    found = Vocabulary(np.array([[vocab[a], vocab[b]] for a, b in pairs], np.int32).reshape(-1, 2))
    made = [vocab["".join(m)] for m in pairs]
    symbols = [chr(b) for b in _PRINTABLE]
    in_order = made == list(range(BASE, BASE + len(made))) and all(
        vocab.get(s) == i and vocab.get(s + "</w>") == i + 256 for i, s in enumerate(symbols)
    )
    below = (found.merges < np.arange(BASE, BASE + len(made))[:, None]).all()
    if not in_order or not below or len(vocab) > found.size:
        raise UserError(f"{path}: the ids are not in CLIP's order (bytes, merges, start, end)")
    return found
