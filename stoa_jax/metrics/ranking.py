"""Retrieval metrics: ranks in a similarity of texts and videos; ties count as wrong."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from stoa_jax.errors import UserError

RECALLS = (1, 5, 10)


def retrieval(
    similarity: np.ndarray, video_of_text: Sequence[int] | np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Compute R@1, R@5, R@10 (percent), MedR and MeanR (the best rank is 1), `t2v` and `v2t`.

    similarity: [texts, videos]; video_of_text: [texts], the identity if not given. With several
    captions a video, every caption is a query of `t2v`; in `v2t` a video has the rank of its best
    caption among all captions. Equal similarities rank before the right one. So do NaNs, and a
    right one that is NaN ranks last.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2:
        raise UserError(f"metrics: similarity has shape {similarity.shape}; it must be 2-D")
    texts, videos = similarity.shape
    if video_of_text is None and texts != videos:
        raise UserError(
            f"metrics: {texts} texts and {videos} videos; "
            "give the video of each text as video_of_text"
        )
    return retrieval_in_blocks(lambda rows: similarity[rows], videos, texts, video_of_text)


def retrieval_in_blocks(
    block: Callable[[slice], np.ndarray],
    videos: int,
    texts: int,
    video_of_text: Sequence[int] | np.ndarray | None = None,
    block_size: int = 4096,
) -> dict[str, dict[str, float]]:
    """Compute `retrieval` from blocks: `block(rows)` returns similarities [rows, videos].

    Every block is requested twice, and the whole matrix is never held in memory.
    """
    owner = _owners(texts, videos, video_of_text)
    slices = [slice(i, min(i + block_size, texts)) for i in range(0, texts, block_size)]
    text_ranks = np.empty(texts, np.int64)
    best = np.full(videos, -np.inf)  # of a video, the similarity of its best caption
    for rows in slices:
        similarity = block(rows)
        own = _own(similarity, owner[rows])
        np.maximum.at(best, owner[rows], np.where(np.isnan(own), -np.inf, own))
        text_ranks[rows] = _not_below(similarity, own[:, None]).sum(1)
    ahead = np.zeros(videos, np.int64)
    for rows in slices:
        similarity = block(rows)
        before = _not_below(similarity, best[None])
        before[np.arange(len(before)), owner[rows]] = False
        ahead += before.sum(0)
    captioned = np.bincount(owner, minlength=videos) > 0
    return {"t2v": _summary(text_ranks), "v2t": _summary(1 + ahead[captioned])}


def grouped_video_to_text(
    similarity: np.ndarray, video_of_text: Sequence[int] | np.ndarray
) -> dict[str, float]:
    """Compute `v2t` as CLIP4Clip does: a video's captions count as one, the most similar."""
    similarity = np.asarray(similarity)
    texts, videos = similarity.shape
    owner = _owners(texts, videos, video_of_text)
    grouped = np.full((videos, videos), -np.inf)
    np.maximum.at(grouped, owner, np.where(np.isnan(similarity), np.inf, similarity))
    own = np.full(videos, -np.inf)
    np.maximum.at(own, owner, np.nan_to_num(_own(similarity, owner), nan=-np.inf))
    before = grouped >= own[None]
    np.fill_diagonal(before, False)
    return _summary(1 + before.sum(0))


def dual_softmax(similarity: np.ndarray, temperature: float = 100.0) -> dict[str, np.ndarray]:
    """Multiply each direction's similarity by a softmax over the queries, [texts, videos].

    This uses all queries of the test set at once, so its metrics are reported separately.
    """
    logits = temperature * np.asarray(similarity, np.float64)
    return {
        "t2v": similarity * _softmax(logits, 0),
        "v2t": similarity * _softmax(logits, 1),
    }


def chance(videos: int, captions_of_video: Sequence[int] | np.ndarray) -> dict[str, dict]:
    """Return the expected metrics of a random order."""
    counts = np.asarray(captions_of_video)
    texts = int(counts.sum())

    def found(right: int, total: int, k: int) -> float:
        if k >= total:
            return 1.0
        return 1 - math.comb(total - right, k) / math.comb(total, k)

    t2v = {f"R@{k}": 100 * min(1.0, k / videos) for k in RECALLS}
    v2t = {
        f"R@{k}": 100 * float(np.mean([found(int(c), texts, k) for c in counts if c]))
        for k in RECALLS
    }
    return {"t2v": t2v, "v2t": v2t}


def _softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis, keepdims=True))
    return exp / exp.sum(axis, keepdims=True)


def _owners(texts: int, videos: int, video_of_text) -> np.ndarray:
    owner = np.arange(texts) if video_of_text is None else np.asarray(video_of_text)
    if owner.shape != (texts,) or not np.issubdtype(owner.dtype, np.integer):
        raise UserError(
            f"metrics: video_of_text is {owner.dtype}{list(owner.shape)}; "
            f"give one integer for each of the {texts} texts"
        )
    if not texts:
        raise UserError("metrics: no texts to rank")
    outside = np.flatnonzero((owner < 0) | (owner >= videos))
    if len(outside):
        raise UserError(
            f"metrics: video_of_text[{outside[0]}] is {owner[outside[0]]}; "
            f"there are {videos} videos"
        )
    return owner


def _own(similarity: np.ndarray, owner: np.ndarray) -> np.ndarray:
    return similarity[np.arange(len(owner)), owner]


def _not_below(similarity: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Mark everything that ranks before `own`, and `own`; NaN counts as before."""
    return ~(similarity < own)


def _summary(ranks: np.ndarray) -> dict[str, float]:
    result = {f"R@{k}": 100 * float(np.mean(ranks <= k)) for k in RECALLS}
    return result | {"MedR": float(np.median(ranks)), "MeanR": float(np.mean(ranks))}
