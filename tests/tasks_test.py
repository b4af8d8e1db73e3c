"""Losses and evaluators of the tasks, on small sets of random clips."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_tasks
from flax import nnx
from toy_tasks import SETS, build, configuration, figures, one_mesh

from stoa_jax import config, metrics, sharding
from stoa_jax.data import pipeline
from stoa_jax.errors import UserError
from stoa_jax.models import decoding
from stoa_jax.models.parameters import named_parameters
from stoa_jax.models.stoa import Stoa, embed_text, embed_video
from stoa_jax.tasks import base, captioning, make_task, multiple_choice, qa
from stoa_jax.text.tagging import VERB

data, no_java = toy_tasks.data, toy_tasks.no_java


@pytest.fixture(scope="module")
def ran(data):
    """Return task, model, evaluator and rows of each task, run once on one device."""

    @functools.cache
    def run(name):
        task = make_task(configuration(data, name))
        model = build(task)
        return task, model, *figures(task, model, one_mesh(task.config))

    return run


def train_batch(task, size=4):
    spec = task.batch_spec(train=True)
    split = task.open_split(task.train_set, "train")
    return next(iter(pipeline.Loader(split, spec, size, threads=1)))


def test_an_unknown_task_is_named():
    c = config.default("retrieval", "tiny")
    c.task = "retrival"
    with pytest.raises(UserError, match="no task 'retrival'; there are pretrain, retrieval"):
        make_task(c)


HEADS = {
    "retrieval": {"fusion/match/kernel", "visual/proj", "logit_scale"},
    "captioning": {"fusion/lm_proj", "fusion/lm_bias", "visual/proj"},
    "qa": {"fusion/answer/kernel", "visual/proj"},
    "multiple_choice": {"fusion/match/kernel", "visual/proj"},
}
OWN = {
    "retrieval": {"loss_vtc", "loss_vtm"},
    "captioning": {"loss_plm"},
    "qa": {"loss_answer"},
    "multiple_choice": {"loss_choice"},
}


@pytest.mark.parametrize("name", SETS)
def test_a_loss_reaches_its_heads_and_leaves_padding_out(data, name):
    task = make_task(configuration(data, name))
    model, batch = build(task), train_batch(task)
    batch["valid"][-1] = False
    noise = dict(batch)
    noise["pixels"] = batch["pixels"].copy()
    noise["pixels"][-1] = 255 - batch["pixels"][-1]
    noise["tokens"] = batch["tokens"].copy()
    noise["tokens"][-1] = batch["tokens"][0]

    @jax.jit
    def run(model, batch):
        return jax.value_and_grad(task.loss, has_aux=True)(model, batch, jax.random.key(0))

    (loss, watch), grads = run(model, batch)
    assert np.isfinite(loss) and loss > 0
    assert {k for k in watch if k.startswith("loss_")} == OWN[name] | {"loss_ota", "loss_asp"}
    losses = {k.removeprefix("loss_"): float(v) for k, v in watch.items() if k.startswith("loss_")}
    # The own loss of an answer or a choice has no weight.
    total = sum(task.settings.get(name, 1.0) * value for name, value in losses.items())
    assert float(loss) == pytest.approx(total, rel=1e-5)
    named = named_parameters(grads)
    assert all(np.isfinite(g).all() for g in named.values())
    for head in HEADS[name]:
        assert np.abs(named[head]).max() > 0, head
    (again, _), _ = run(model, noise)
    assert float(again) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_switches_mean_the_same_in_every_task(data, name):
    off = {"loss__ota": 0.0, "model__actions": False}
    task = make_task(configuration(data, name, **off))
    model = jax.eval_shape(lambda: Stoa(task.model_config(), rngs=nnx.Rngs(0)))
    batch = train_batch(task)
    _, watch = jax.eval_shape(task.loss, model, batch, jax.random.key(0))
    assert {k for k in watch if k.startswith("loss_")} == OWN[name]


def test_retrieval_is_what_plain_numpy_finds(ran):
    task, model, evaluator, rows = ran("retrieval")
    split = evaluator.split
    (batch,) = pipeline.Loader(split, task.batch_spec(False), 11, train=False, threads=1)
    texts = [split.tokens(i, 12, 1024)[0] for i in range(11)]
    owner = np.repeat(np.arange(11), [len(t) for t in texts])
    tokens = np.concatenate(texts)
    assert len(tokens) > 11 and evaluator.videos == 11

    @jax.jit
    def everything(model, batch, tokens):
        video, text = base.encode_video(model, batch), model.encode_text(tokens)

        def against(one):  # every text with one clip
            clip = jax.tree.map(lambda x: jnp.repeat(x[one][None], len(tokens), 0), video)
            return jax.nn.softmax(model.match_logits(model.pair(clip, text)), -1)[:, 1]

        match = jax.lax.map(against, jnp.arange(11)).T
        return embed_text(text) @ embed_video(video).T, match

    similarity, match = map(np.asarray, everything(model, batch, tokens))
    wanted = metrics.retrieval(similarity, owner)
    for side, values in wanted.items():
        for key, value in values.items():
            row = rows[f"retrieval/{side}/{key}"]
            assert row.value == pytest.approx(value)
            assert row.n == (len(tokens) if side == "t2v" else 11)
    for side, axis in (("t2v", 1), ("v2t", 0)):
        order = np.argsort(np.argsort(-similarity, axis), axis)
        mixed = np.where(order < 3, 2 + match, similarity)
        for key, value in metrics.retrieval(mixed, owner)[side].items():
            assert rows[f"retrieval/reranked/{side}/{key}"].value == pytest.approx(value)
    assert rows["retrieval/chance/t2v/R@1"].value == pytest.approx(100 / 11)
    assert "retrieval/clip4clip/v2t/R@1" in rows and "retrieval/dual_softmax/v2t/R@1" in rows


@pytest.mark.parametrize("name", SETS)
def test_eight_devices_say_what_one_says(data, ran, name):
    _, model, _, one = ran(name)
    task = make_task(configuration(data, name, mesh__fsdp=2))
    mesh = sharding.make_mesh(task.config)
    assert mesh.size == 8
    with jax.set_mesh(mesh):
        _, many = figures(task, model, mesh)
    assert one.keys() == many.keys()
    for key, row in one.items():
        assert many[key].n == row.n
        assert many[key].value == pytest.approx(row.value, abs=1e-4), key


def test_captions_are_decoded_and_scored_against_all_references(ran):
    task, model, evaluator, rows = ran("captioning")
    split = evaluator.split
    assert set(evaluator.predictions) == {"captioning/greedy", "captioning/beam2"}
    greedy = evaluator.predictions["captioning/greedy"]
    assert list(greedy) == [split.metadata(i).video_id for i in range(11)]

    (batch,) = pipeline.Loader(split, task.batch_spec(False), 11, train=False, threads=1)

    @jax.jit
    def generate(model, batch):
        return captioning.generate(model, base.encode_video(model, batch), max_pieces=5)

    tokens = generate(model, batch)
    tokenizer = captioning.Tokenizer(1024)
    assert list(greedy.values()) == [tokenizer.decode(t) for t in tokens]

    references = {split.metadata(i).video_id: split.metadata(i).texts for i in range(11)}
    scores = metrics.caption_scores(greedy, references)
    for key in ("BLEU-4", "ROUGE-L", "CIDEr", "METEOR"):
        row = rows[f"captioning/greedy/{key}"]
        assert row.n == 11 and row.value == pytest.approx(scores[key])
        assert f"captioning/greedy/authors/{key}" in rows
        assert f"captioning/most_frequent/{key}" in rows
    assert evaluator.most_frequent == min(
        text for i in range(9) for text in task.training.metadata(i).texts
    )


def test_the_likelihood_of_references_is_that_of_the_decoder(ran):
    task, model, evaluator, rows = ran("captioning")
    (batch,) = pipeline.Loader(evaluator.split, task.batch_spec(False), 11, train=False, threads=1)
    tokens = batch["tokens"]
    length = tokens.shape[1]

    @jax.jit
    def piece_by_piece(model, batch):
        visual = decoding.visual_keys(model, base.encode_video(model, batch))
        cache = decoding.empty_cache(model, len(tokens), 1, length)
        found = []
        for at in range(length - 1):
            given, following = batch["tokens"][:, at, None], batch["tokens"][:, at + 1, None]
            logits, cache = decoding.next_word(model, visual, cache, given, at)
            log_probability = jax.nn.log_softmax(logits[:, 0])
            found.append(-jnp.take_along_axis(log_probability, following, 1)[:, 0])
        return jnp.stack(found, 1)

    nll = np.asarray(piece_by_piece(model, batch))
    real = tokens[:, 1:] > 0
    assert rows["captioning/nll"].n == real.sum()
    assert rows["captioning/nll"].value == pytest.approx(nll[real].mean(), rel=1e-4)
    assert "captioning/verb_nll" not in rows  # these texts have no tags
    batch["tags"][:, 3] = VERB
    found = jax.jit(lambda m, b: captioning.likelihood(m, b, base.encode_video(m, b)))(model, batch)
    np.testing.assert_allclose(np.asarray(found.nll)[real], nll[real], rtol=1e-4)
    np.testing.assert_array_equal(found.real, real)
    assert found.verb[:, 2].all() and found.verb.sum() == len(tokens)


def test_only_numbers_reach_the_loop(ran):
    task, model, evaluator, _ = ran("captioning")
    found = dict(evaluator(model, one_mesh(task.config)))
    assert "captioning/greedy/CIDEr" in found and "captioning/greedy/METEOR" not in found
    assert all(isinstance(value, float) for value in found.values())


def test_an_answer_outside_the_classes_is_wrong(data):
    # Answers are red, dog and two; only the two most frequent are kept.
    task = make_task(configuration(data, "qa", model__num_answers=2))
    assert task.answers == ("red", "dog") and task.extras() == {"answers": ["red", "dog"]}
    model = build(task)
    evaluator, rows = figures(task, model, one_mesh(task.config))
    right = [a == b for _, _, b in evaluator.questions for a in ["red"]]
    n = len(right)
    assert rows["qa/majority/accuracy"].value == pytest.approx(100 * np.mean(right))
    outside = np.mean([b == "two" for _, _, b in evaluator.questions])
    assert 0 < outside < 1
    assert rows["qa/covered"].value == pytest.approx(100 * (1 - outside))
    predictions = list(evaluator.predictions["qa"].values())
    assert len(predictions) == n == rows["qa/accuracy"].n
    for p in predictions:
        assert p["top"][0] == [p["answer"], p["probability"]]
        chances = [chance for _, chance in p["top"]]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1, abs=1e-5)
    exact = np.mean([p["answer"] == p["right"] for p in predictions])
    assert rows["qa/accuracy"].value == pytest.approx(100 * exact)


@pytest.mark.parametrize("limit", [0, 12])
def test_questions_about_one_clip_share_its_encoding(data, monkeypatch, limit):
    task = make_task(configuration(data, "qa", eval__max_examples=limit))
    model, mesh = build(task), one_mesh(task.config)
    evaluator = task.evaluators()["qa"]
    encoded = []
    encode = base.encode_video
    monkeypatch.setattr(base, "encode_video", lambda m, b: encoded.append(1) or encode(m, b))
    base._encoder.cache_clear()
    video = evaluator.encode(model, mesh)
    assert len(encoded) == 1  # traced once for all batches
    found = evaluator.run(qa.best_answers, model, mesh, video)
    base._encoder.cache_clear()

    count = limit or len(evaluator.questions)
    clips = len({i for i, _, _ in evaluator.questions})
    assert len(video.cls) == clips < count == len(found[0])
    spec = task.batch_spec(False)
    (batch,) = pipeline.Loader(evaluator.split, spec, count, train=False, max_examples=count)
    direct = jax.jit(lambda m, b: qa.best_answers(m, b, encode(m, b)))(model, batch)
    np.testing.assert_allclose(found[0], direct[0], rtol=1e-4)
    np.testing.assert_array_equal(found[1], direct[1])


def test_the_first_piece_counts_only_in_the_authors_row(data, monkeypatch):
    task = make_task(configuration(data, "qa"))
    task.answers = ("dog", "dogs house", "red", "two")  # the first two begin alike
    monkeypatch.setattr(
        qa,
        "best_answers",
        lambda model, batch, video: (jnp.ones((8, 1)), jnp.ones((8, 1), jnp.int32)),
    )
    evaluator, rows = figures(task, build(task), one_mesh(task.config))
    assert all(p["answer"] == "dogs house" for p in evaluator.predictions["qa"].values())
    dogs = np.mean([answer == "dog" for _, _, answer in evaluator.questions])
    assert rows["qa/accuracy"].value == 0
    first = captioning.Tokenizer(1024).encode
    alike = first("dog")[1] == first("dogs house")[1]
    assert rows["qa/authors/accuracy"].value == pytest.approx(100 * dogs * alike)


def test_multiple_choice_takes_the_best_match(ran):
    task, model, evaluator, rows = ran("multiple_choice")
    (batch,) = pipeline.Loader(evaluator.split, task.batch_spec(False), 11, train=False, threads=1)

    @jax.jit
    def one_option(model, batch, tokens):
        text = model.encode_text(tokens)
        logits = model.match_logits(model.pair(base.encode_video(model, batch), text))
        return logits[:, 1] - logits[:, 0]

    scores = np.stack([one_option(model, batch, batch["tokens"][:, i]) for i in range(5)], 1)
    right = scores.argmax(1) == batch["answer"]
    assert rows["multiple_choice/accuracy"].value == pytest.approx(100 * right.mean())
    predictions = list(evaluator.predictions["multiple_choice"].values())
    assert [p["chosen"] for p in predictions] == scores.argmax(1).tolist()
    np.testing.assert_allclose(
        [p["probabilities"] for p in predictions], jax.nn.softmax(scores), atol=1e-5
    )
    assert rows["multiple_choice/chance/accuracy"].value == 20


def test_accuracy_by_kind_adds_up(data, ran, monkeypatch):
    task, _, evaluator, rows = ran("qa")
    kinds = [row for name, row in rows.items() if name.startswith("qa/kind/")]
    assert sum(row.n for row in kinds) == rows["qa/accuracy"].n
    mean = sum(row.value * row.n for row in kinds) / sum(row.n for row in kinds)
    assert mean == pytest.approx(rows["qa/accuracy"].value)
    task.config.unlock()
    monkeypatch.setattr(type(task), "eval_set", "msvd/qa")
    assert evaluator.kind_of("Who is there?") == "who" and evaluator.kind_of("is it?") == "other"


def test_a_choice_is_right_against_a_kind_if_above_its_options():
    task = make_task(configuration("", "multiple_choice"))
    (evaluator,) = task.evaluators().values()
    evaluator.kinds = np.array([["right", "motion", "things"], ["right", "motion", "motion"]])
    evaluator.answers = np.array([0, 0])
    rows = {r.metric: r for r in evaluator.by_kind("m", np.array([[1.0, 0, 2], [1, 0, 3]]))}
    assert (rows["m/kind/motion/accuracy"].value, rows["m/kind/motion/accuracy"].n) == (50, 2)
    assert (rows["m/kind/things/accuracy"].value, rows["m/kind/things/accuracy"].n) == (0, 1)


def test_ties_in_a_choice_are_wrong():
    scores = np.array([[1.0, 1, 0, 0, 0], [2, 1, 0, 0, 0], [np.nan] * 5])
    assert multiple_choice.chosen_right(scores, np.array([0, 0, 0])).tolist() == [
        False,
        True,
        False,
    ]


def test_options_drawn_from_captions_are_others():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 9, (12, 4)))
    tokens = tokens.at[3].set(tokens[0])
    valid = jnp.arange(12) < 11
    options, real, answer = multiple_choice.sample_options(jax.random.key(0), tokens, valid)
    assert options.shape == (12, 5, 4) and not answer.any() and real[:11].all()
    for row in range(11):
        np.testing.assert_array_equal(options[row, 0], tokens[row])
        others = {tuple(np.asarray(o)) for o in options[row, 1:]}
        assert len(others) == 4 - (0 if row not in others else 1) or row != 0
        assert tuple(np.asarray(tokens[row])) not in others
        assert tuple(np.asarray(tokens[11])) not in others
    _, real, _ = multiple_choice.sample_options(jax.random.key(0), tokens[:3], valid[:3])
    assert real.sum(1).tolist() == [3, 3, 3]


def test_multiple_choice_learns_from_captions_too(data):
    c = configuration(data, "multiple_choice", data__eval_set="synthetic/multiple_choice")
    c.data.sets = (("folder/captions", 1.0),)
    task = make_task(c)
    assert task.batch_spec(train=True).kind == "caption"
    assert task.batch_spec(train=False).kind == "multiple_choice"
    loss, watch = jax.jit(task.loss)(build(task), train_batch(task), jax.random.key(0))
    assert np.isfinite(loss) and 0 <= watch["accuracy"] <= 1


@pytest.mark.parametrize("name", SETS)
def test_a_part_is_marked(data, name):
    (evaluator,) = make_task(configuration(data, name)).evaluators().values()
    assert not evaluator.partial
    (evaluator,) = make_task(configuration(data, name, eval__max_examples=6)).evaluators().values()
    assert evaluator.partial


def test_missing_clips_of_a_published_split_make_it_partial(data):
    c = configuration(data, "retrieval", data__eval_set="msvd/retrieval", eval__rerank=0)
    task = make_task(c)
    (evaluator,) = task.evaluators().values()
    assert evaluator.missing == 665 and evaluator.partial
    found = dict(evaluator(build(task), one_mesh(c)))
    assert found and all(key.startswith("partial/retrieval/") for key in found)


def test_variants_hide_what_they_say():
    rng = np.random.default_rng(0)
    batch = {
        "pixels": jnp.asarray(rng.integers(0, 255, (2, 3, 4, 4, 3), np.uint8)),
        "boxes": jnp.asarray(rng.random((2, 3, 2, 4))),
        "classes": jnp.asarray(rng.integers(0, 9, (2, 3, 2))),
        "scores": jnp.asarray(rng.random((2, 3, 2))),
    }
    still = base.ablate(batch, "single_frame")
    for name in batch:
        for t in range(3):
            np.testing.assert_array_equal(still[name][:, t], batch[name][:, 1])
    blind = base.ablate(batch, "text_only")
    assert (blind["classes"] == -1).all() and (blind["pixels"] == blind["pixels"][0, 0, 0, 0]).all()


def test_an_unknown_variant_is_named(data):
    task = make_task(configuration(data, "qa", eval__variants=("singel",)))
    (evaluator,) = task.evaluators().values()
    with pytest.raises(UserError, match="no variant 'singel'; there are single_frame, text_only"):
        evaluator.variants  # noqa: B018


def test_released_answers_by_first_piece(data):
    c = configuration(data, "qa")
    c.model.vision_depth = 3  # it reads blocks 1 and 2
    released = dataclasses.replace(config.model_config(c).released(), roi_size=2)
    c.model.update(dataclasses.asdict(released))
    task = make_task(c)
    model, batch = build(task), train_batch(task)
    loss, watch = jax.jit(task.loss)(model, batch, jax.random.key(0))
    assert np.isfinite(loss) and "loss_answer" in watch
    evaluator, rows = figures(task, model, one_mesh(c))
    assert rows["qa/authors/accuracy"].n == len(evaluator.questions)
