"""On the frames of the records, the library gives what the evaluators write."""

import functools

import numpy as np
import pytest
import saved_models
import toy_tasks
from toy_tasks import build, configuration, figures, one_mesh

import stoa_jax
from stoa_jax.data import records
from stoa_jax.tasks import make_task

data, no_java = toy_tasks.data, toy_tasks.no_java
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=[16, 32], ids=["stored_larger", "stored_smaller"])
def size(request):
    return request.param


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """Return the model as the library opens it, its evaluator, and its clips, by task and size."""

    @functools.cache
    def run(name, size):
        task = make_task(configuration(data, name, model__image_size=size))
        network = build(task)
        evaluator, _ = figures(task, network, one_mesh(task.config))
        folder = tmp_path_factory.mktemp("models") / name
        saved_models.write_network(folder, network, task.extras().get("answers", ()))
        return stoa_jax.load(folder, truncate=True), evaluator, clips_of(evaluator.split)

    return run


def clips_of(split):
    clips = []
    for i in range(len(split)):
        record = split.read(i)
        frames = np.stack([records.decode_jpeg(frame) for frame in record["frames"]])
        found = stoa_jax.Detections(
            record["boxes"], record["classes"], record["scores"], split.class_names
        )
        clips.append(stoa_jax.Clip(frames, detections=found))
    return clips


def test_captions(ran, size):
    model, evaluator, clips = ran("captioning", size)
    for beam, row in ((1, "captioning/greedy"), (2, "captioning/beam2")):
        told = model.caption(clips, beam=beam, max_pieces=5, batch_size=4)
        wanted = [text.strip() for text in evaluator.predictions[row].values()]
        assert told == wanted and len(set(told)) > 1


def test_answers(ran, size):
    model, evaluator, clips = ran("qa", size)
    split = evaluator.split
    pairs = [(clips[i], q) for i in range(len(split)) for q in split.metadata(i).texts]
    found = model.answer(*zip(*pairs, strict=True), top=4, batch_size=5)
    wanted = list(evaluator.predictions["qa"].values())
    assert len(found) == len(wanted)
    for best, row in zip(found, wanted, strict=True):
        assert best[0].text == row["answer"]
        np.testing.assert_allclose(best[0].probability, row["probability"], atol=1e-5)
    assert len({round(row["probability"], 3) for row in wanted}) > 1


def test_choices(ran, size):
    model, evaluator, clips = ran("multiple_choice", size)
    wanted, row = evaluator.predictions["multiple_choice"], 0
    for i, clip in enumerate(clips):
        texts = evaluator.split.metadata(i).texts
        for first in range(0, len(texts), records.OPTIONS):
            found = model.choose(clip, texts[first : first + records.OPTIONS])
            assert found.index == wanted[str(row)]["chosen"]
            np.testing.assert_allclose(
                found.probabilities, wanted[str(row)]["probabilities"], atol=1e-5
            )
            row += 1
    assert row == len(wanted)


def test_matches_and_cosines(ran, size):
    model, evaluator, clips = ran("retrieval", size)
    split = evaluator.split
    texts = [text for i in range(len(split)) for text in split.metadata(i).texts]
    ids = {name: i for i, name in enumerate(evaluator.ids)}
    table = model.match(clips, texts, batch_size=3)
    cosine = model.encode_text(texts) @ model.encode_video(clips).T
    compared = 0
    reranked = evaluator.predictions["retrieval/reranked"]
    for t, row in enumerate(reranked.values()):
        for video, probability in zip(row["retrieved"], row["probabilities"], strict=True):
            if probability is not None:
                np.testing.assert_allclose(table[ids[video], t], probability, atol=1e-5)
                compared += 1
    assert compared >= len(texts)
    for t, row in enumerate(evaluator.predictions["retrieval"].values()):
        best = [ids[video] for video in row["retrieved"]]
        np.testing.assert_allclose(
            cosine[t, best], np.sort(cosine[t])[::-1][: len(best)], atol=1e-5
        )
