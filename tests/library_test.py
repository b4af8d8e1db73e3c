import json

import numpy as np
import pytest
import saved_models

import stoa_jax

ANSWERS = ["red", "blue", "two"]
TEXTS = ["a dog runs", "two men wrestle", "a pan on a stove"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = saved_models.shallow(num_answers=4)
    return saved_models.write_random(
        tmp_path_factory.mktemp("models") / "tiny", config, answers=ANSWERS
    )


@pytest.fixture(scope="module")
def model(folder):
    return stoa_jax.load(folder)


def clips(*lengths, size=(60, 80), seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randint(0, 256, (n, *size, 3)).astype(np.uint8) for n in lengths]


def detections(frames, objects=3, seed=0):
    rng = np.random.RandomState(seed)
    low = rng.uniform(0, 0.5, (frames, objects, 2))
    boxes = np.concatenate([low, low + 0.4], -1).astype(np.float32)
    classes = rng.randint(0, 2, (frames, objects))
    return stoa_jax.Detections(boxes, classes, rng.uniform(size=classes.shape), ("dog", "man"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_call(model):
    videos = clips(4, 9, 2)
    assert model.has == {"embed", "match", "caption", "answer", "trajectories", "actions"}
    assert model.match(videos, TEXTS[:2]).shape == (3, 2)
    assert all(isinstance(text, str) for text in model.caption(videos, beam=2, max_pieces=4))
    answers = model.answer(videos, TEXTS, top=2)
    assert [len(best) for best in answers] == [2, 2, 2]
    assert all(best[0].probability >= best[1].probability for best in answers)
    choice = model.choose(videos[0], TEXTS)
    assert choice.index == choice.probabilities.argmax()
    np.testing.assert_allclose(choice.probabilities.sum(), 1, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pairs_are_the_diagonal(model):
    videos = [
        stoa_jax.Clip(v, detections=detections(4, seed=i)) for i, v in enumerate(clips(4, 4, 4))
    ]
    table = model.match(videos, TEXTS)
    np.testing.assert_allclose(model.match(videos, TEXTS, pairs=True), table.diagonal(), atol=1e-6)


def test_saving_keeps_everything(folder, tmp_path):
    (folder / "calibration.json").write_text(
        json.dumps({"version": 1, "temperature": 2.5, "threshold": 0.7})
    )
    try:
        model = stoa_jax.load(folder)
        model.save(tmp_path / "saved")
        again = stoa_jax.load(tmp_path / "saved")
        assert again.fingerprint == model.fingerprint
        assert again.threshold == model.threshold == 0.7
        assert again.answers == model.answers == tuple(ANSWERS)
        video = [stoa_jax.Clip(clips(4)[0], detections=detections(4))]
        np.testing.assert_array_equal(again.match(video, TEXTS), model.match(video, TEXTS))
        np.testing.assert_array_equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    finally:
        (folder / "calibration.json").unlink()
    with pytest.raises(stoa_jax.UserError, match="not calibrated"):
        _ = stoa_jax.load(folder).threshold


def test_an_explanation_says_who_was_matched_to_what(model, tmp_path):
    clip = stoa_jax.Clip(clips(4)[0], detections=detections(4))
    found = model.explain(clip, "a dog runs to a man")
    c = model.config
    assert {t.name for t in found.trajectories} <= {"dog", "man"}
    for t in found.trajectories:
        assert t.boxes.shape == (4, 4) and t.shown.shape == (4,)
        assert t.word in (None, "dog", "man") and 0 < t.word_score <= 1
    for a in found.actions:
        assert a.attention.shape == (4, c.grid, c.grid)
        assert a.word in (None, "runs")
        assert (a.attention.sum((1, 2)) < 1 + 1e-5).all()  # objects have the remaining attention
    assert len(found.actions) == c.action_tokens
    probability = model.match([clip], ["a dog runs to a man"])[0, 0]
    np.testing.assert_allclose(found.probability, probability, atol=1e-6)
    assert json.loads(json.dumps(found.to_dict()))["actions"][0]["attention"]
    for suffix in ("png", "webp", "mp4"):
        found.draw(tmp_path / f"film.{suffix}")
        assert (tmp_path / f"film.{suffix}").stat().st_size > 1000
    with pytest.raises(stoa_jax.UserError, match="gif"):
        found.draw(tmp_path / "film.gif")
