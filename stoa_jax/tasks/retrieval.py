"""Retrieval: dual-encoder similarity of all pairs, the best re-ranked by the fusion encoder.

Shapes: B clips, R pairs, L text positions, d width.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from stoa_jax import metrics, sharding
from stoa_jax.metrics import calibration
from stoa_jax.models.features import TextFeatures, VideoFeatures
from stoa_jax.models.stoa import Stoa, embed_text, embed_video
from stoa_jax.tasks.base import Row, SplitEvaluator, TaskBase, named, percent, stacked
from stoa_jax.tasks.pairs import Pairs, labelled_pairs

SHOWN = 5  # retrieved clips per text in `predictions.json`
# Texts, or pairs to re-rank, in a batch for each clip of an evaluation batch: texts are short.
PAIRS_PER_CLIP = 8
TEXT_BLOCK = 4096  # texts whose features are on the devices at once


class Retrieval(TaskBase):
    """Retrieval by the joint loss: VTC and VTM, and OTA and ASP if active."""

    name = "retrieval"

    def make_evaluator(self) -> "RetrievalEvaluator":
        """Rank both ways, by the dual encoder and re-ranked."""
        return RetrievalEvaluator(self)


def embed_texts(model: Stoa, tokens: Array) -> Array:
    """Return texts [B, L] in the shared space [B, d]."""
    return embed_text(model.encode_text(tokens))


def embed_and_encode_texts(model: Stoa, tokens: Array) -> tuple[Array, TextFeatures]:
    """Return texts [B, L] in the shared space and their features for the fusion encoder."""
    text = model.encode_text(tokens)
    return embed_text(text), text


def match_margins(
    model: Stoa, videos: VideoFeatures, texts: TextFeatures, video: Array, text: Array
) -> Array:
    """Return the log-odds [R] that pairs match; `video` [R] and `text` [R] are indices."""
    of_video = jax.tree.map(lambda x: x[video], videos)
    of_text = jax.tree.map(lambda x: x[text], texts)
    logits = model.match_logits(model.pair(of_video, of_text))
    return logits[:, 1] - logits[:, 0]


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
            encoded = self.encode_all(model, mesh, variant, for_fusion=rerank > 0)
            similarity = encoded.text @ encoded.video.T
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
                chosen = best_pairs(similarity, rerank)
                pairs = None if variant else self.labelled_pairs
                probability = self.probabilities(model, mesh, encoded, chosen, pairs)
                # A cosine is at most 1, so re-ranked pairs come before all others.
                both = {
                    side: np.where(chosen[side], 2 + probability, similarity) for side in chosen
                }
                self.predictions[named(name, "reranked")] = self.retrieved(both["t2v"], probability)
                yield from self.table(
                    named(name, "reranked"),
                    {side: metrics.retrieval(both[side], owner)[side] for side in both},
                    f"dual encoder, the first {rerank} re-ranked by match probability",
                )
                if pairs is not None:
                    yield from self.calibration_rows(
                        named(name, "match"), probability[pairs.text, pairs.video], pairs.matches
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

    def retrieved(
        self, similarity: np.ndarray, probability: np.ndarray | None = None
    ) -> dict[str, dict[str, Any]]:
        """Return the first clips for each text, and the rank of the right one.

        With match probabilities [texts, videos], also return those of these pairs.
        """
        owner = self.texts["owner"]
        own = similarity[np.arange(len(owner)), owner]
        ranks = (~(similarity < own[:, None])).sum(1)
        first = np.argsort(-similarity, 1, kind="stable")[:, :SHOWN]
        found = {}
        for i, text in enumerate(self.captions):
            row: dict[str, Any] = {
                "retrieved": [self.ids[j] for j in first[i]],
                "rank": int(ranks[i]),
            }
            if probability is not None:
                row["probability"] = float(probability[i, owner[i]])
                # A clip that was not re-ranked has no probability.
                row["probabilities"] = [
                    None if np.isnan(p) else float(p) for p in probability[i, first[i]]
                ]
            found[f"{i}: {self.ids[owner[i]]}: {text}"] = row
        return found

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

    def encode_all(
        self, model: Stoa, mesh: Mesh, variant: str = "", *, for_fusion: bool
    ) -> "Encoded":
        """Encode every clip and every text once."""
        embed = self.jit(embed_video, mesh)
        keep = (lambda video: (embed(video), video)) if for_fusion else embed
        video = self.encode(model, mesh, variant, keep)
        jitted = self.jit(_encode_batch if for_fusion else _embed_batch, mesh)
        tokens = {"tokens": self.texts["tokens"]}
        text = self.in_batches(lambda batch: jitted(model, batch), mesh, tokens)
        if not for_fusion:
            return Encoded(video, text, None, None)
        return Encoded(video[0], text[0], video[1], text[1])

    def in_batches(self, function: Callable, mesh: Mesh, arrays: Mapping[str, np.ndarray]) -> Any:
        """Apply `function` to batches of rows that every process holds; remove the padding."""
        size = self.config.eval.batch_size * PAIRS_PER_CLIP
        n = len(next(iter(arrays.values())))
        mine = slice(
            jax.process_index() * size // jax.process_count(),
            (jax.process_index() + 1) * size // jax.process_count(),
        )

        def found(start: int) -> Any:
            rows = np.minimum(np.arange(start, start + size), n - 1)[mine]
            batch = {name: x[rows] for name, x in arrays.items()}
            return function(sharding.to_devices(batch, mesh, size))

        return stacked(map(found, range(0, n, size)), n)

    def margins(
        self, model: Stoa, mesh: Mesh, encoded: "Encoded", text: np.ndarray, video: np.ndarray
    ) -> np.ndarray:
        """Return the match head's log-odds of pairs of a text and a clip, given by index."""
        everywhere = sharding.replicated(mesh)

        def place(x: np.ndarray) -> Array:
            return jax.make_array_from_callback(x.shape, everywhere, x.__getitem__)

        videos = jax.tree.map(place, encoded.video_features)
        jitted = self.jit(_margins_batch, mesh)
        size = min(TEXT_BLOCK, len(encoded.text))
        found = np.zeros(len(text), np.float32)
        for start in range(0, len(encoded.text), size):
            here = np.flatnonzero((text >= start) & (text < start + size))
            if not len(here):
                continue
            rows = np.minimum(np.arange(start, start + size), len(encoded.text) - 1)
            texts = jax.tree.map(lambda x, rows=rows: place(x[rows]), encoded.text_features)
            features = {"videos": videos, "texts": texts}
            pairs = {
                "text": (text[here] - start).astype(np.int32),
                "video": video[here].astype(np.int32),
            }
            found[here] = self.in_batches(
                lambda batch, features=features: jitted(model, {**batch, **features}), mesh, pairs
            )
        return found

    def probabilities(
        self,
        model: Stoa,
        mesh: Mesh,
        encoded: "Encoded",
        chosen: Mapping[str, np.ndarray],
        pairs: Pairs | None,
    ) -> np.ndarray:
        """Return match probabilities [texts, videos] of the chosen pairs; NaN elsewhere.

        The pairs of every text and its clip are included, and the given labelled pairs.
        """
        ranked = chosen["t2v"] | chosen["v2t"]
        labelled = np.zeros_like(ranked)
        labelled[np.arange(len(ranked)), self.texts["owner"]] = True
        if pairs is not None:
            labelled[pairs.text, pairs.video] = True
        margins = np.full(ranked.shape, np.nan)
        for wanted in (ranked, labelled & ~ranked):
            margins[wanted] = self.margins(model, mesh, encoded, *np.nonzero(wanted))
        return calibration.match_probability(margins, self.calibration.temperature)

    @functools.cached_property
    def captions(self) -> list[str]:
        """All texts of the clips, in the order of `texts`."""
        return [text for i in range(self.videos) for text in self.split.metadata(i).texts]

    @functools.cached_property
    def labelled_pairs(self) -> Pairs | None:
        """Pairs that match and pairs that do not; None if every text fits every clip."""
        texts_of = [self.split.metadata(i).texts for i in range(self.videos)]
        holds = None
        if self.task.eval_set == "synthetic/captions":
            from stoa_jax.data.synthetic.reading import holds
        e = self.config.eval
        return labelled_pairs(texts_of, holds, e.mismatches, self.config.seed, e.calibration_texts)

    def calibration_rows(
        self, name: str, probability: np.ndarray, matches: np.ndarray
    ) -> Iterator[Row]:
        """Yield the calibration error, and the accepted and rejected shares at the threshold."""
        fitted = self.calibration.threshold is not None
        how = f"at temperature {self.calibration.temperature:.3g}" if fitted else "not calibrated"
        yield Row(
            named(name, "ece"),
            calibration.expected_calibration_error(
                probability, matches, calibration.even_weights(matches)
            ),
            len(matches),
            f"expected calibration error in 15 bins, {how}; {matches.sum()} pairs that match and "
            f"{(~matches).sum()} that do not, with equal weight",
        )
        if self.calibration.threshold is None:
            return
        accepted = probability >= self.calibration.threshold
        at = f"at the threshold {self.calibration.threshold:.4g}"
        yield Row(
            named(name, "accepted"),
            percent(accepted[matches]),
            int(matches.sum()),
            f"percent of the pairs that match accepted {at}",
        )
        yield Row(
            named(name, "rejected"),
            percent(~accepted[~matches]),
            int((~matches).sum()),
            f"percent of the pairs that do not match rejected {at}",
        )


class Encoded(NamedTuple):
    """Clips and texts of a split: in the shared space, and their features for fusion."""

    video: np.ndarray  # [videos, d]
    text: np.ndarray  # [texts, d]
    video_features: VideoFeatures | None
    text_features: TextFeatures | None


def best_pairs(similarity: np.ndarray, top: int) -> dict[str, np.ndarray]:
    """Return which pairs [texts, videos] are among the best `top` of their text, or their clip."""
    of_text = np.argpartition(-similarity, top - 1, 1)[:, :top]  # [texts, top] videos
    top_texts = min(top, len(similarity))
    of_video = np.argpartition(-similarity, top_texts - 1, 0)[:top_texts]  # [top, videos]
    chosen = {side: np.zeros(similarity.shape, bool) for side in ("t2v", "v2t")}
    np.put_along_axis(chosen["t2v"], of_text, True, 1)
    np.put_along_axis(chosen["v2t"], of_video, True, 0)
    return chosen


def _embed_batch(model: Stoa, batch: Mapping[str, Array]) -> Array:
    return embed_texts(model, batch["tokens"])


def _encode_batch(model: Stoa, batch: Mapping[str, Array]) -> tuple[Array, TextFeatures]:
    return embed_and_encode_texts(model, batch["tokens"])


def _margins_batch(model: Stoa, batch: Mapping[str, Any]) -> Array:
    return match_margins(model, batch["videos"], batch["texts"], batch["video"], batch["text"])
