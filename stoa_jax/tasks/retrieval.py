"""Retrieval: dual-encoder similarity of all pairs, the best re-ranked by the fusion encoder.

Shapes: B clips, R pairs, L text positions, d width.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from stoa_jax import metrics, sharding
from stoa_jax.models.features import VideoFeatures
from stoa_jax.models.stoa import Stoa, embed_text, embed_video
from stoa_jax.tasks.base import Row, SplitEvaluator, TaskBase, encode_video, named

SHOWN = 5  # retrieved videos of a query in predictions.json
# Texts, or re-ranked pairs, in a batch for each clip of an evaluation batch: texts are short.
PAIRS_PER_CLIP = 8


class Retrieval(TaskBase):
    """Retrieval by the joint loss: VTC and VTM, and OTA and ASP where they are on."""

    name = "retrieval"

    def make_evaluator(self) -> "RetrievalEvaluator":
        """Rank both ways, by the dual encoder and re-ranked."""
        return RetrievalEvaluator(self)


def embed_and_encode(model: Stoa, batch: Mapping[str, Array]) -> tuple[Array, VideoFeatures]:
    """Return clips in the shared space and their features for the fusion encoder."""
    video = encode_video(model, batch)
    return embed_video(video), video


def embed_clips(model: Stoa, batch: Mapping[str, Array]) -> Array:
    """Return clips in the shared space [B, d]."""
    return embed_video(encode_video(model, batch))


def embed_texts(model: Stoa, tokens: Array) -> Array:
    """Return texts [B, L] in the shared space [B, d]."""
    return embed_text(model.encode_text(tokens))


def match_probability(model: Stoa, tokens: Array, features: VideoFeatures, which: Array) -> Array:
    """Return the probability [R] that each text matches its clip, `which` of the features."""
    text = model.encode_text(tokens)
    video = jax.tree.map(lambda x: x[which], features)
    fused = model.fuse(video, text.tokens, text.mask)
    return jax.nn.softmax(model.match_logits(fused, text.sep_index), -1)[:, 1]


class RetrievalEvaluator(SplitEvaluator):
    """Ranking of every text against every clip of the split."""

    prefix = "retrieval"

    def rows(self, model: Stoa, mesh: Mesh) -> Iterator[Row]:
        """Yield dual encoder, dual softmax, re-ranked and chance, in both directions."""
        texts = self.texts
        counts = np.bincount(texts["owner"], minlength=self.videos)
        several = len(texts["owner"]) > self.videos
        self.predictions = {}
        for variant in self.variants:
            if variant == "text_only":  # all clips look the same
                continue
            rerank = min(self.config.eval.rerank, self.videos)
            if "fusion/match" in self.untrained:
                rerank = 0
            function = embed_and_encode if rerank else embed_clips
            out = self.run(function, model, mesh, variant)
            video, features = out if rerank else (out, None)
            similarity = self.text_embeddings(model, mesh) @ video.T
            owner = texts["owner"]
            name = named(self.prefix, variant)

            result = metrics.retrieval(similarity, owner)
            self.predictions[name] = self.retrieved(similarity)
            yield from self.table(name, result, "dual encoder, cosine of all pairs")
            if several:
                grouped = metrics.grouped_video_to_text(similarity, owner)
                yield from self.table(
                    named(name, "clip4clip"),
                    {"v2t": grouped},
                    "dual encoder; a video's captions count as one, as in CLIP4Clip",
                )
            both = metrics.dual_softmax(similarity)
            yield from self.table(
                named(name, "dual_softmax"),
                {side: metrics.retrieval(both[side], owner)[side] for side in both},
                "dual encoder times a softmax over all queries of the test set",
            )
            if rerank:
                both = self.reranked(model, mesh, similarity, features, rerank)
                self.predictions[named(name, "reranked")] = self.retrieved(both["t2v"])
                yield from self.table(
                    named(name, "reranked"),
                    {side: metrics.retrieval(both[side], owner)[side] for side in both},
                    f"dual encoder, the first {rerank} re-ranked by match probability",
                )
        yield from self.table(
            named(self.prefix, "chance"), metrics.chance(self.videos, counts), "a random order"
        )

    def table(self, name: str, result: Mapping[str, Mapping], protocol: str) -> Iterator[Row]:
        """Yield the rows of one protocol."""
        ties = "ties counted against us; R@k in percent, ranks from 1"
        for side, values in result.items():
            n = len(self.texts["owner"]) if side == "t2v" else self.videos
            for key, value in values.items():
                yield Row(named(name, side, key), value, n, f"{protocol}; {ties}")

    def retrieved(self, similarity: np.ndarray) -> dict[str, dict[str, Any]]:
        """Return the first videos for each text, and the rank of the right one."""
        about = [self.split.metadata(i) for i in range(self.videos)]
        queries = [(a.video_id, text) for a in about for text in a.texts]
        owner = self.texts["owner"]
        own = similarity[np.arange(len(owner)), owner]
        ranks = (~(similarity < own[:, None])).sum(1)
        first = np.argsort(-similarity, 1, kind="stable")[:, :SHOWN]
        return {
            f"{i}: {video}: {text}": {
                "retrieved": [about[j].video_id for j in first[i]],
                "rank": int(ranks[i]),
            }
            for i, (video, text) in enumerate(queries)
        }

    @functools.cached_property
    def videos(self) -> int:
        """Number of clips that are evaluated."""
        return min(self.limit or len(self.split), len(self.split))

    @functools.cached_property
    def texts(self) -> dict[str, np.ndarray]:
        """Tokens [texts, L] of all texts of the clips, and the clip that owns each [texts]."""
        spec = self.task.batch_spec(train=False)
        tokens = [
            self.split.tokens(i, spec.text_length, spec.vocab_size)[0] for i in range(self.videos)
        ]
        owner = np.repeat(np.arange(self.videos), [len(t) for t in tokens])
        return {"tokens": np.concatenate(tokens), "owner": owner}

    def text_embeddings(self, model: Stoa, mesh: Mesh) -> np.ndarray:
        """Embed all texts in the shared space [texts, d]."""
        jitted = self.jit(_embed_batch, mesh)
        return self.in_batches(lambda x: jitted(model, x), mesh, {"tokens": self.texts["tokens"]})

    def in_batches(self, function, mesh: Mesh, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Apply `function` to batches of rows, which every process holds; padding is removed."""
        size = self.config.eval.batch_size * PAIRS_PER_CLIP
        n = len(next(iter(arrays.values())))
        mine = slice(
            jax.process_index() * size // jax.process_count(),
            (jax.process_index() + 1) * size // jax.process_count(),
        )
        results = []
        for i in range(0, n, size):
            rows = np.minimum(np.arange(i, i + size), n - 1)[mine]
            batch = sharding.to_devices({k: v[rows] for k, v in arrays.items()}, mesh, size)
            results.append(function(batch))
        return np.concatenate([np.asarray(x) for x in results])[:n]

    def reranked(
        self, model: Stoa, mesh: Mesh, similarity: np.ndarray, features: Any, top: int
    ) -> dict[str, np.ndarray]:
        """Return similarities [texts, videos] with each query's best `top` by match probability."""
        of_text = np.argpartition(-similarity, top - 1, 1)[:, :top]  # [texts, top] videos
        top_texts = min(top, len(similarity))
        of_video = np.argpartition(-similarity, top_texts - 1, 0)[:top_texts]  # [top, videos]
        chosen = {side: np.zeros(similarity.shape, bool) for side in ("t2v", "v2t")}
        np.put_along_axis(chosen["t2v"], of_text, True, 1)
        np.put_along_axis(chosen["v2t"], of_video, True, 0)
        text, video = np.nonzero(chosen["t2v"] | chosen["v2t"])

        everywhere = sharding.replicated(mesh)
        features = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, everywhere, x.__getitem__), features
        )
        jitted = self.jit(_match_batch, mesh)
        scores = self.in_batches(
            lambda batch: jitted(model, {**batch, "features": features}),
            mesh,
            {"tokens": self.texts["tokens"][text], "which": video.astype(np.int32)},
        )
        match = np.zeros_like(similarity)
        match[text, video] = scores
        # A cosine is at most 1, so re-ranked pairs come before all others.
        return {side: np.where(chosen[side], 2 + match, similarity) for side in chosen}


def _embed_batch(model: Stoa, batch: Mapping[str, Array]) -> Array:
    return embed_texts(model, batch["tokens"])


def _match_batch(model: Stoa, batch: Mapping[str, Any]) -> Array:
    return match_probability(model, batch["tokens"], batch["features"], batch["which"])
