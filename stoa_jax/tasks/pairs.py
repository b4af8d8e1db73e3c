"""Pairs of a text and a clip that are known to match or not to match."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

TRIES = 50  # random clips tried for a mismatch of one text


class Pairs(NamedTuple):
    """Labelled pairs of texts and clips, by index."""

    text: np.ndarray  # [P], in the order of the clips' texts
    video: np.ndarray  # [P]
    matches: np.ndarray  # [P] bool


def labelled_pairs(
    texts_of: Sequence[Sequence[str]],
    holds: Callable[[str, Sequence[str]], bool] | None = None,
    mismatches: int = 4,
    seed: int = 0,
    most: int = 0,
) -> Pairs | None:
    """Pair each text with its clip and with `mismatches` random clips that it does not describe.

    `texts_of` lists the texts of each clip. A clip that has an equal text is not a mismatch, nor is
    one for which `holds(text, texts of the clip)`. Above `most` texts (0: no limit) a random subset
    is used. Returns None if no text has a mismatch.
    """
    rng = np.random.default_rng(seed)
    owner = [clip for clip, of_clip in enumerate(texts_of) for _ in of_clip]
    texts = [text for of_clip in texts_of for text in of_clip]
    known = [{normalised(text) for text in of_clip} for of_clip in texts_of]
    chosen = list(range(len(texts)))
    if 0 < most < len(texts):
        chosen = sorted(rng.choice(len(texts), most, replace=False).tolist())
    rows: list[tuple[int, int, bool]] = []
    for i in chosen:
        rows.append((i, owner[i], True))
        found: list[int] = []
        plain = normalised(texts[i])
        for clip in map(int, rng.integers(len(texts_of), size=TRIES)):
            if len(found) == mismatches:
                break
            if clip == owner[i] or clip in found or plain in known[clip]:
                continue
            if holds is not None and holds(texts[i], texts_of[clip]):
                continue
            found.append(clip)
        rows += [(i, clip, False) for clip in found]
    text, video, matches = map(np.array, zip(*rows, strict=True))
    return None if matches.all() else Pairs(text, video, matches.astype(bool))


def normalised(text: str) -> str:
    """Return a text in lower case, without a final stop, with single spaces."""
    return " ".join(text.lower().rstrip(" .").split())
