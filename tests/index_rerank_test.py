"""Re-ranking from stored features: the same probabilities as `match`, without decoding."""

import dataclasses

import numpy as np
import pytest
import saved_models
from clip_tiny import FOLDER
from flax import nnx

import stoa_jax
from stoa_jax.errors import UserError
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.stoa import Stoa

TEXTS = ["a dog runs", "two men wrestle", "a pan on a stove"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # some clips have no detections


@pytest.fixture(scope="module", params=["stoa", "plus", "released"])
def model(request, tmp_path_factory):
    c = dataclasses.replace(ModelConfig.tiny(), text_depth=1, fusion_depth=1)
    c = c if request.param == "stoa" else getattr(c, request.param)()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return stoa_jax.load(saved_models.write_network(folder, Stoa(c, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def clips(model):
    rng = np.random.default_rng(0)
    found = []
    for i in range(7):
        frames = rng.integers(0, 255, (model.config.frames, 40, 56, 3), np.uint8)
        corner = rng.uniform(0, 0.5, (len(frames), 3, 2))
        boxes = np.concatenate([corner, corner + 0.4], -1).astype(np.float32)
        classes = rng.integers(0, 2, (len(frames), 3))
        scores = rng.uniform(size=classes.shape)
        objects = stoa_jax.Detections(boxes, classes, scores, ("dog", "man"))
        found.append(stoa_jax.Clip(frames, detections=objects if i % 2 else None))
    return found


@pytest.fixture(scope="module")
def index(model, clips, tmp_path_factory):
    index = stoa_jax.Index.create(tmp_path_factory.mktemp("i") / "index", model, fusion=True)
    index.add(clips, [f"{i}" for i in range(len(clips))])
    return index


def test_probabilities_are_those_of_match(model, clips, index):
    for text in TEXTS:
        hits = index.search(text)
        wanted = model.match(clips, [text])[:, 0]
        found = {int(hit.id): hit.probability for hit in hits}
        # The features are stored in float16.
        np.testing.assert_allclose([found[i] for i in range(len(clips))], wanted, atol=2e-3)
        probabilities = [hit.probability for hit in hits]
        assert probabilities == sorted(probabilities, reverse=True)


def test_without_reranking_the_order_is_by_score(index):
    hits = index.search(TEXTS[0], rerank=False)
    assert all(hit.probability is None and hit.matched is None for hit in hits)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    first = index.search(TEXTS[0], k=2, rerank=2)
    assert {hit.id for hit in first} == {hit.id for hit in hits[:2]}
    with pytest.raises(UserError, match="only a text is re-ranked"):
        index.search(np.ones(index.settings.dim), rerank=True)


def test_features_survive_folding_and_compaction(model, clips, index, tmp_path):
    other = stoa_jax.Index.create(tmp_path / "index", model, fusion=True)
    for i, clip in enumerate(clips):
        other.add([clip], [f"{i}"])
    extra = np.zeros((model.config.frames, 40, 56, 3), np.uint8)
    other.add([extra], ["x"])
    other.delete(["x"])
    other.compact()
    other = stoa_jax.Index.open(tmp_path / "index", model)
    for mine, theirs in zip(index.search(TEXTS[1]), other.search(TEXTS[1]), strict=True):
        assert mine.id == theirs.id
        assert mine.probability == pytest.approx(theirs.probability, abs=1e-3)


def test_the_threshold_is_measured_over_the_whole_index(index):
    # Random weights: `matched` is unknown until it is measured.
    texts = [f"{a} {b}" for a in ("red", "blue", "old", "wet") for b in "abcdef"]
    if index.settings.threshold is None:
        assert index.search(TEXTS[0])[0].matched is None
    threshold = index.calibrate(texts, rate=0.1)
    assert index.settings.threshold == threshold
    accepted = sum(any(hit.matched for hit in index.search(text)) for text in texts)
    assert accepted <= 0.1 * len(texts)
    assert any(index.search(text)[0].matched for text in texts) or accepted == 0
    for hit in index.search(TEXTS[0]):
        assert hit.matched == (hit.probability >= threshold)
    with pytest.raises(UserError, match=r"24 texts cannot show a rate of 0\.01; give at least 99"):
        index.calibrate(texts, rate=0.01)


def test_what_fusion_needs(model, index, tmp_path):
    with pytest.raises(UserError, match="needs a model with a match head"):
        stoa_jax.Index.create(tmp_path / "index", stoa_jax.load(FOLDER), fusion=True)
    with pytest.raises(UserError, match="stores fusion features, which vectors alone lack"):
        index.add_vectors(np.ones((1, index.settings.dim)), ["v"])
    plain = stoa_jax.Index.create(tmp_path / "index", model)
    with pytest.raises(UserError, match="rerank needs an index created with fusion=True"):
        plain.search(TEXTS[0], rerank=True)
