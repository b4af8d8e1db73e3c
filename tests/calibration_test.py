"""Calibration: temperature, error and threshold as pure functions, then `--mode=calibrate`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_tasks

from stoa_jax import calibrate, checkpoint, evaluate, sharding
from stoa_jax.errors import UserError
from stoa_jax.inference import sidecars
from stoa_jax.metrics import calibration
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.tasks import base, make_task, retrieval
from stoa_jax.tasks.pairs import labelled_pairs

data, no_java = toy_tasks.data, toy_tasks.no_java


def made(temperature, n=20_000, seed=0):
    """Return margins whose probabilities are calibrated after division by the temperature."""
    rng = np.random.default_rng(seed)
    right = rng.normal(0, 2, n)
    matches = rng.random(n) < calibration.match_probability(right)
    return right * temperature, matches


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_the_temperature_is_found_again(temperature):
    margins, matches = made(temperature)
    assert calibration.fit_temperature(margins, matches) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_is_the_best_one():
    margins, matches = made(3.0, 400)

    def loss(t):
        p = calibration.match_probability(margins, t)
        return -np.mean(np.log(np.where(matches, p, 1 - p)))

    best = calibration.fit_temperature(margins, matches)
    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2))


def test_scaling_the_margins_scales_the_temperature():
    margins, matches = made(1.0, 500)
    one = calibration.fit_temperature(margins, matches)
    assert calibration.fit_temperature(5 * margins, matches) == pytest.approx(5 * one, rel=1e-6)


def test_weights_count_as_repetition():
    margins, matches = made(2.0, 300)
    times = np.random.default_rng(1).integers(1, 4, 300)
    repeated = calibration.fit_temperature(np.repeat(margins, times), np.repeat(matches, times))
    assert calibration.fit_temperature(margins, matches, times) == pytest.approx(repeated, rel=1e-9)


def test_extreme_margins_stay_within_bounds():
    matches = np.array([True, True, False, False])
    separated = np.array([1.0, 2, -1, -2])
    assert calibration.fit_temperature(separated, matches) == calibration.COLDEST
    assert calibration.fit_temperature(-separated, matches) == calibration.HOTTEST
    huge = calibration.match_probability([1e30, -1e30, 0.0])
    np.testing.assert_array_equal(huge, [1, 0, 0.5])


def test_calibration_lowers_the_error_and_keeps_the_order():
    margins, matches = made(5.0)
    before = calibration.match_probability(margins)
    after = calibration.match_probability(margins, calibration.fit_temperature(margins, matches))
    error = calibration.expected_calibration_error
    assert error(after, matches) < 0.02 < 0.1 < error(before, matches)
    np.testing.assert_array_equal(np.argsort(before[:500]), np.argsort(after[:500]))


def test_the_error_of_known_cases():
    error = calibration.expected_calibration_error
    assert error([1.0, 0.0], [True, False]) == 0
    assert error([1.0, 0.0], [False, True]) == 1
    assert error([0.7] * 10, [True] * 7 + [False] * 3) == pytest.approx(0)
    assert error([0.9, 0.9], [True, False], [3, 1]) == pytest.approx(0.15)
    # A permutation changes nothing, and more bins than values do not hide a gap.
    p, y = np.random.default_rng(0).random(50), np.arange(50) % 2 == 0
    order = np.random.default_rng(1).permutation(50)
    assert error(p, y) == pytest.approx(error(p[order], y[order]))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.2, 0.99])
@pytest.mark.parametrize("tied", [False, True])
def test_the_threshold_keeps_the_rate_and_is_the_least_that_does(rate, tied):
    p = np.random.default_rng(3).random(237)
    if tied:
        p = np.round(p, 1)
    threshold = calibration.threshold_at(p, rate)
    assert np.mean(p >= threshold) <= rate
    lower = np.nextafter(threshold, -1)
    assert np.mean(p >= lower) > rate


def test_evenly_weighted_kinds():
    weights = calibration.even_weights([True, False, False, False])
    np.testing.assert_allclose(weights, [1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_what_cannot_be_calibrated_is_one_line():
    with pytest.raises(UserError, match="3 of 3 pairs match"):
        calibration.fit_temperature([1, 2, 3], [True] * 3)
    with pytest.raises(UserError, match="1 values are not finite"):
        calibration.fit_temperature([1, np.nan, 3], [True, False, True])
    with pytest.raises(UserError, match=r"rate of false accepts is 1\.5"):
        calibration.threshold_at([0.5], 1.5)
    with pytest.raises(UserError, match="no mismatched pairs"):
        calibration.threshold_at([], 0.1)


def test_mismatches_are_clips_that_no_caption_covers():
    texts = [["A dog.", "a red dog"], ["a  dog", "a cat"], ["a bird"], ["a cow"]]
    pairs = labelled_pairs(texts, mismatches=2, seed=0)
    owner = [0, 0, 1, 1, 2, 3]
    flat = [text for of_clip in texts for text in of_clip]
    wrong = {i: set() for i in range(6)}
    for text, video, match in zip(*pairs, strict=True):
        assert match == (owner[text] == video)
        if not match:
            wrong[text].add(int(video))
    assert {flat[i]: wrong[i] for i in (0, 2)} == {"A dog.": {2, 3}, "a  dog": {2, 3}}
    assert all(len(found) == 2 for found in wrong.values())
    assert labelled_pairs([["a"], ["A ."]]) is None
    # A clip that a caption also describes is not a mismatch of it.
    pairs = labelled_pairs(texts, lambda text, of: "a bird" in of, mismatches=3)
    assert not any(video == 2 and not match for _, video, match in zip(*pairs, strict=True))
    few = labelled_pairs(texts, most=3, seed=1)
    assert few.matches.sum() == 3
    np.testing.assert_array_equal(few.text, labelled_pairs(texts, most=3, seed=1).text)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Return a retrieval run's directory, its configuration and its model."""
    c = toy_tasks.configuration(data, "retrieval", eval__calibration_split="test")
    task, workdir = make_task(c), tmp_path_factory.mktemp("run")
    model = toy_tasks.build(task)
    checkpoints = checkpoint.Checkpoints(workdir, c)
    meta = {"model": {}, "extras": task.extras()}
    checkpoints.save(7, named_parameters(model), {"step": np.int32(7)}, meta, None)
    checkpoints.wait()
    checkpoints.close()
    return c, workdir, model


def test_a_run_is_calibrated_and_evaluated_at_its_threshold(run, capsys):
    c, workdir, model = run
    before = sorted(p for p in (workdir / "checkpoints").rglob("*") if p.is_file())
    uncalibrated = {row["metric"] for row in evaluate.run(c, workdir, verbose=False)}
    assert "retrieval/match/ece" in uncalibrated
    assert "retrieval/match/accepted" not in uncalibrated

    found = calibrate.run(c, workdir)
    assert json.loads((workdir / "calibration.json").read_text()) == found
    assert found["version"] == 1 and found["split"] == "folder/captions:test"
    assert found["false_accept_rate"] == 0.01 and found["checkpoint"].endswith("checkpoints/7")
    assert found["accepted_mismatches"] <= 0.01
    assert "threshold" in capsys.readouterr().out
    assert sorted(p for p in (workdir / "checkpoints").rglob("*") if p.is_file()) == before

    # The same pairs by hand, one at a time.
    task = make_task(c)
    (evaluator,) = task.evaluators().values()
    pairs = evaluator.labelled_pairs
    rows = list(evaluator.loader(texts=False))
    tokens = evaluator.texts["tokens"]

    @jax.jit
    def one(model, video, text):
        clip = base.encode_video(model, {k: v[video][None] for k, v in images.items()})
        encoded = model.encode_text(text[None])
        logits = model.match_logits(model.pair(clip, encoded))
        return logits[0, 1] - logits[0, 0]

    images = {
        k: jnp.concatenate([r[k] for r in rows]) for k in ("pixels", "boxes", "classes", "scores")
    }
    margins = np.array(
        [one(model, v, tokens[t]) for t, v in zip(pairs.text, pairs.video, strict=True)]
    )
    wanted = calibrate.fit(margins, pairs.matches, 0.01)
    assert found["temperature"] == pytest.approx(wanted["temperature"], rel=1e-3)
    assert found["threshold"] == pytest.approx(wanted["threshold"], abs=1e-4)

    rows = {row["metric"]: row for row in evaluate.run(c, workdir, verbose=False)}
    accepted, rejected = rows["retrieval/match/accepted"], rows["retrieval/match/rejected"]
    assert accepted["value"] == pytest.approx(100 * found["accepted_matches"])
    assert rejected["value"] == pytest.approx(100 * (1 - found["accepted_mismatches"]))
    assert accepted["n"] == found["matches"]
    assert accepted["n"] + rejected["n"] == found["pairs"]
    error = rows["retrieval/match/ece"]["value"]
    assert error == pytest.approx(found["expected_calibration_error"]["after"], abs=1e-6)
    # The probabilities in the predictions are calibrated.
    listed = json.loads((workdir / "predictions.json").read_text())["retrieval/reranked"]
    key, value = next(iter(listed.items()))
    number, video, text = key.split(": ", 2)
    assert (number, video) == ("0", evaluator.ids[0]) and text == evaluator.captions[0]
    own = calibration.match_probability(margins[pairs.matches], found["temperature"])
    assert value["probability"] == pytest.approx(own[0], abs=1e-4)
    assert value["probabilities"][:3] == sorted(value["probabilities"][:3], reverse=True)


def test_a_calibration_that_cannot_be_read_is_one_line(tmp_path):
    assert sidecars.read_calibration(tmp_path) is None
    path = tmp_path / "calibration.json"
    path.write_text('{"version": 2, "temperature": 1}')
    with pytest.raises(UserError, match="format version 2, and this release reads 1"):
        sidecars.read_calibration(tmp_path)
    path.write_text('{"version": 1, "temperature": "hot", "threshold": 0.5}')
    with pytest.raises(UserError, match=r"calibration\.json: temperature is 'hot'"):
        sidecars.read_calibration(tmp_path)


def test_calibration_needs_captions_and_a_rate(data, tmp_path):
    c = toy_tasks.configuration(data, "qa", eval__calibration_split="test")
    with pytest.raises(UserError, match=r"synthetic/qa:test: calibration needs captions"):
        calibrate.run(c, tmp_path)
    c.eval.false_accept_rate = 1.0
    with pytest.raises(UserError, match=r"config\.eval\.false_accept_rate: 1\.0"):
        calibrate.run(c, tmp_path)
    # A task on other data is calibrated on a named set of captions.
    c = toy_tasks.configuration(data, "qa", eval__calibration_set="folder/captions")
    c.eval.calibration_split = "test"
    assert calibrate.evaluator_for(c).split_name == "folder/captions:test"


def test_pairs_are_scored_from_features_encoded_once(data, monkeypatch):
    """Scores need no text tower, and blocks of texts change nothing."""
    c = toy_tasks.configuration(data, "retrieval")
    task = make_task(c)
    model, (evaluator,) = toy_tasks.build(task), task.evaluators().values()
    mesh = sharding.make_mesh(c, jax.devices()[:1])
    encoded = evaluator.encode_all(model, mesh, for_fusion=True)
    text, video = map(np.ravel, np.indices((len(encoded.text), 11)))
    whole = evaluator.margins(model, mesh, encoded, text, video)
    broken = with_parameters(
        model,
        {
            name: jnp.full_like(x, jnp.nan) if name.startswith(("text/", "visual/")) else x
            for name, x in named_parameters(model).items()
        },
    )
    np.testing.assert_array_equal(evaluator.margins(broken, mesh, encoded, text, video), whole)
    monkeypatch.setattr(retrieval, "TEXT_BLOCK", 5)
    blocks = evaluator.margins(model, mesh, encoded, text[::-1], video[::-1])
    np.testing.assert_allclose(blocks[::-1], whole, atol=1e-5)
