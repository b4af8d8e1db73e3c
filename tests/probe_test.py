"""The probes of what tokens tell, and the measure of what trajectories follow."""

import numpy as np
import pytest

import stoa_jax
from benchmarks import alignment_targets, matches, oracle, probe, probing, trajectories
from stoa_jax.data.synthetic import World
from stoa_jax.models.parameters import named_parameters


def test_a_probe_reads_what_is_linear_and_guesses_at_noise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 900)
    x = np.eye(4)[labels] @ rng.normal(size=(4, 30)) + 0.3 * rng.normal(size=(900, 30))
    noise = rng.normal(size=(900, 30))
    for features, low, high in ((x, 0.95, 1.0), (noise, 0.1, 0.4)):
        got = probing.scores(features[:600], np.eye(4)[labels[:600]], features[600:])
        assert low <= (got.argmax(1) == labels[600:]).mean() <= high


@pytest.mark.slow
def test_untrained_encoders_at_the_same_towers():
    network = stoa_jax.load("synthetic").whole
    before, after = named_parameters(network), named_parameters(probing.untrained(network, 0))
    for name in before:
        same = np.array_equal(before[name], after[name])
        assert same == (name.split("/")[0] not in probing.ENCODERS), name
    np.testing.assert_array_equal(
        after["trajectory/blocks/mlp/up/kernel"], before["visual/blocks/mlp/up/kernel"][-2:]
    )


def test_exact_detections_are_followed_exactly():
    clip = World("test", size=32, frames=4, max_objects=3, siblings=1).clip(0)
    owner = trajectories.owners(clip.true_boxes, clip.true_classes, clip.true_boxes)
    shown = clip.true_classes >= 0
    np.testing.assert_array_equal(owner[shown], np.nonzero(shown)[1])
    assert (owner[~shown] == -1).all()


def test_matches_of_a_trained_model_are_mostly_right():
    counts = matches.counted(stoa_jax.load("synthetic"), clips=10, max_objects=3)
    named = {kind: n for (of, kind), n in counts.items() if of == "named"}
    assert sum(named.values()) > 8
    assert named["own"] > 0.8 * sum(named.values())
    lines = list(matches.rows({"checkpoint": counts}))
    assert lines[0].endswith("| checkpoint, % |") and len(lines) == 2 + 4 + 3
    assert matches.what("star", "star") == "own" and matches.what(None, "star") == "none"


@pytest.mark.slow
def test_the_probe_prints_its_tables(capsys):
    probe.main(["--train=60", "--test=20", "--steps=2", "--colors"])
    printed = capsys.readouterr().out
    assert "| trajectories |" in printed and "| the answer head |" in printed


@pytest.mark.slow
def test_alignment_targets_train_the_encoders_of_another_number_of_actions():
    network = stoa_jax.load("synthetic").whole
    fresh = probing.untrained(alignment_targets.resized(network, 4, "alone"), 0)
    clips = probing.draw(fresh, "train", 64, 3)
    texts = probing.captions(fresh, clips)
    setting = alignment_targets.Setting("asp", 0.1, "alone", 4)
    after = named_parameters(alignment_targets.trained(fresh, setting, clips, texts, 2, 0))
    before, first = named_parameters(fresh), named_parameters(network)
    assert after["action/queries"].shape[0] == 4 != first["action/queries"].shape[0]
    changed = {n.split("/")[0] for n in after if not np.array_equal(before[n], after[n])}
    assert changed == {"action", "regions"}
    for name in ("text/token_embedding", "visual/patch/kernel"):
        np.testing.assert_array_equal(after[name], first[name])


@pytest.mark.slow
def test_only_fusion_and_the_vectors_of_motions_learn_beside_an_oracle(capsys):
    network = stoa_jax.load("synthetic").whole
    data = oracle.Data.of(network, "train", 40, 3)
    for scene, motions in zip(data.clips.scenes, data.motions, strict=True):
        named = [oracle.MOTIONS[i] for i in motions if i < len(oracle.MOTIONS)]
        assert named == [event.motion for event in scene.events]
    seen = np.unique(data.tokens)
    model = oracle.with_new_fusion(network, "oracle", seen, 0)
    tables = [table for _, table in oracle.trained(model, "oracle", data, seen, 2, 0)]
    after, table = probing.last(oracle.trained(model, "oracle", data, seen, 2, 0))
    before, after = named_parameters(model), named_parameters(after)
    changed = {n.split("/")[0] for n in after if not np.array_equal(before[n], after[n])}
    assert changed == {"fusion"}
    np.testing.assert_array_equal(table, tables[-1])
    assert not np.array_equal(tables[0], tables[1])
    oracle.main(["--train=40", "--test=32", "--steps", "2", "--inputs", "base", "actions"])
    said = capsys.readouterr().out
    assert "| base | 2 |" in said and "| actions | 2 |" in said


@pytest.mark.slow
def test_fusion_reads_only_the_tokens_that_an_input_names():
    network = stoa_jax.load("synthetic").whole
    data = oracle.Data.of(network, "train", 4, 3)
    seen, batch = np.unique(data.tokens), data.batch(np.arange(4), np.zeros(4, int))
    shipped = network.encode_objects(*batch["seen"])
    found = {}
    for inputs in ("trajectories", "actions", "untrained actions"):
        model = oracle.with_new_fusion(network, inputs, seen, 0)
        found[inputs] = oracle.encoded(model, None, batch, inputs)
    assert found["trajectories"].actions.shape[1] == 0
    assert found["trajectories"].object_mask.any() and not found["actions"].object_mask.any()
    np.testing.assert_allclose(found["actions"].actions, shipped.actions, atol=1e-5)
    assert np.abs(found["untrained actions"].actions - shipped.actions).max() > 0.1
