"""Captioning: the prefix language model, decoded greedily and by beam search.

Shapes: B clips, M generated pieces, L text positions.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from stoa_jax import decode, metrics, objectives
from stoa_jax.metrics import coco
from stoa_jax.models import decoding
from stoa_jax.models.features import VideoFeatures
from stoa_jax.models.stoa import Stoa
from stoa_jax.tasks.base import Row, SplitEvaluator, TaskBase, named
from stoa_jax.text import Tokenizer

AUTHORS_PIECES = 32  # length at which the authors cut references, start and end included


class Captioning(TaskBase):
    """Captioning by the joint loss: PLM, and OTA and ASP if active."""

    name = "captioning"

    def make_evaluator(self) -> "CaptioningEvaluator":
        """Score greedy and beam search against all references."""
        return CaptioningEvaluator(self)


class Search(NamedTuple):
    """Options of decoding."""

    beams: int = 1  # 1: greedy
    max_pieces: int = 30
    length_penalty: float = 0.0
    no_repeat_ngram: int = 0


def generate(
    model: Stoa,
    video: VideoFeatures,
    *,
    beams: int = 1,
    max_pieces: int = 30,
    length_penalty: float = 0.0,
    no_repeat_ngram: int = 0,
) -> Array:
    """Decode captions [B, M + 2] of clips, start and end included."""
    c = model.config
    clips = len(video.cls)
    visual = decoding.visual_keys(model, video)
    cache = decoding.empty_cache(model, clips, beams, max_pieces + 1)

    def step(cache, tokens, position):
        return decoding.next_word(model, visual, cache, tokens, position)

    options = {
        "start": c.vocab_size - 2,
        "end": c.vocab_size - 1,
        "max_pieces": max_pieces,
        "length_penalty": length_penalty,
        "no_repeat_ngram": no_repeat_ngram,
    }
    if beams == 1:
        return decode.greedy(step, cache, clips, **options).tokens
    return decode.beam_search(step, cache, clips, beams=beams, **options).tokens


class Likelihood(NamedTuple):
    """Negative log-likelihood of every piece of one caption per clip."""

    nll: Array  # [B, L - 1], of each piece after the start, in nats
    real: Array  # [B, L - 1], False for padding
    verb: Array  # [B, L - 1], True for the last piece of a verb


def likelihood(model: Stoa, batch: Mapping[str, Array], video: VideoFeatures) -> Likelihood:
    """Predict each piece of the captions of a batch from the clip and the pieces before it."""
    tokens = batch["tokens"]
    text = model.encode_text(tokens)
    if model.config.prefix_lm == "position_query":
        features = model.next_token_features(video, text.tokens)
    else:
        causal = objectives.prefix_attention(jnp.ones_like(text.sep_index), tokens.shape[1])
        features = model.fuse(video, text.tokens, text.mask, causal).text
    nll = objectives.cross_entropy(model.lm_logits(features[:, :-1]), tokens[:, 1:])
    return Likelihood(nll, text.mask[:, 1:], batch["tags"][:, 1:] == objectives.VERB)


class CaptioningEvaluator(SplitEvaluator):
    """Scores of the captions of every clip against all its references."""

    prefix = "captioning"
    needs = ("fusion/lm_proj",)

    def rows(self, model: Stoa, mesh: Mesh) -> Iterator[Row]:
        """Yield the four metrics for each decoding method and for the most frequent caption.

        Also yield the negative log-likelihood of references, for which nothing is decoded.
        """
        e = self.config.eval
        tokenizer = Tokenizer(model.config.vocab_size)
        # The model was trained up to its text length, not beyond.
        pieces = min(e.max_pieces, model.config.text_length - 2)
        how = f"at most {pieces} pieces"
        if e.no_repeat_ngram:
            how += f", no {e.no_repeat_ngram}-gram twice"
        self.predictions = {}
        for variant in self.variants:
            video = self.encode(model, mesh, variant)
            for beams in sorted({1, e.beam}):
                name = named(self.prefix, variant, "greedy" if beams == 1 else f"beam{beams}")
                options = Search(beams, pieces, no_repeat_ngram=e.no_repeat_ngram)
                protocol = f"greedy, {how}"
                if beams > 1:
                    options = options._replace(length_penalty=e.length_penalty)
                    protocol = f"beam {beams}, length penalty {e.length_penalty}, {how}"
                tokens = self.run(_generator(options), model, mesh, video)
                texts = dict(zip(self.ids, map(tokenizer.decode, tokens), strict=True))
                self.predictions[name] = texts
                yield from self.scored(name, texts, protocol)
                if beams == 1:
                    yield from self.authors(named(name, "authors"), texts, how)
            found = self.run(likelihood, model, mesh, video)
            for key, which in (("nll", found.real), ("verb_nll", found.real & found.verb)):
                if which.any():
                    what = "last pieces of verbs" if key == "verb_nll" else "all pieces"
                    yield Row(
                        named(self.prefix, variant, key),
                        float(found.nll[which].mean()),
                        int(which.sum()),
                        f"nats per piece, {what} of the first reference, each given those before",
                    )
        if frequent := self.most_frequent:
            texts = dict.fromkeys(self.ids, frequent)
            yield from self.scored(
                named(self.prefix, "most_frequent"),
                texts,
                f"for every clip the most frequent training caption, {frequent!r}",
            )

    def scored(self, name: str, texts: Mapping[str, str], protocol: str) -> Iterator[Row]:
        """Yield the four metrics of one set of captions."""
        by = "the PTB jar" if coco.package() else "our PTB tokeniser"
        for key, value in metrics.caption_scores(texts, self.references).items():
            how = f"{protocol}; all references, tokenised by {by}; pycocoevalcap's scale"
            yield Row(named(name, key), value, len(texts), how)

    def authors(self, name: str, texts: Mapping[str, str], how: str) -> Iterator[Row]:
        """Yield the four metrics as STOA-VLP's authors compute them."""
        whole = Tokenizer()
        cut = {
            i: [whole.decode(whole.encode(text, AUTHORS_PIECES)) for text in references]
            for i, references in self.references.items()
        }
        protocol = f"greedy, {how}; as STOA-VLP's authors: no PTB tokeniser, references cut at 32"
        for key, value in metrics.authors_caption_scores(texts, cut).items():
            yield Row(named(name, key), value, len(texts), f"{protocol} pieces")

    @functools.cached_property
    def references(self) -> dict[str, list[str]]:
        """All texts of each clip."""
        return {name: list(self.split.metadata(i).texts) for i, name in enumerate(self.ids)}

    @functools.cached_property
    def most_frequent(self) -> str:
        """The most frequent training caption; of equally frequent ones the first by alphabet."""
        split = self.task.training
        if split is None:
            return ""
        counts = collections.Counter(
            " ".join(text.lower().split())
            for i in range(len(split))
            for text in split.metadata(i).texts
        )
        return min(counts, key=lambda text: (-counts[text], text))


@functools.cache
def _generator(options: Search) -> Callable[[Stoa, Mapping[str, Array], VideoFeatures], Array]:
    """Bind options to `generate`; equal options give the same function, which compiles once."""

    def function(model: Stoa, batch: Mapping[str, Array], video: VideoFeatures) -> Array:
        return generate(model, video, **options._asdict())

    return function
