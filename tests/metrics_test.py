"""Caption metrics against pycocoevalcap, ranks against a plain loop."""

import json
import pathlib
import time

import numpy as np
import pytest

from stoa_jax import metrics
from stoa_jax.errors import UserError
from stoa_jax.metrics import captions, coco

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "caption_scores.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_caption_scores_equal_pycocoevalcap(name):
    case = GOLDEN[name]
    ours = metrics.caption_scores(case["hypotheses"], case["references"], tokenizer="python")
    assert ours.pop("METEOR") == "needs Java"
    assert ours == pytest.approx({k: case["scores"][k] for k in ours}, abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("name", GOLDEN)
def test_authors_scores_equal_pycocoevalcap_without_tokenising(name, monkeypatch):
    monkeypatch.setattr(coco, "package", lambda: None)
    case = GOLDEN[name]
    ours = metrics.authors_caption_scores(case["hypotheses"], case["references"])
    assert ours.pop("METEOR") == "needs Java"
    assert ours == pytest.approx({k: case["untokenised"][k] for k in ours}, abs=1e-9, rel=1e-9)


@pytest.mark.java
def test_authors_scores_with_java():
    case = GOLDEN["varied"]
    ours = metrics.authors_caption_scores(case["hypotheses"], case["references"])
    assert ours == pytest.approx(case["untokenised"], abs=1e-9, rel=1e-9)


@pytest.mark.java
@pytest.mark.parametrize("name", ["odd", "empty"])
def test_with_java_all_four_equal_pycocoevalcap(name):
    case = GOLDEN[name]
    ours = metrics.caption_scores(case["hypotheses"], case["references"], tokenizer="java")
    assert ours == pytest.approx(case["scores"], abs=1e-9, rel=1e-9)


@pytest.mark.java
def test_live_pycocoevalcap_gives_the_same():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    case = GOLDEN["varied"]
    as_theirs = {i: [{"caption": text} for text in v] for i, v in case["references"].items()}
    references = PTBTokenizer().tokenize(as_theirs)
    as_theirs = {i: [{"caption": text}] for i, text in case["hypotheses"].items()}
    made = PTBTokenizer().tokenize(as_theirs)
    theirs = {
        "BLEU-4": Bleu(4).compute_score(references, made, verbose=0)[0][3],
        "METEOR": Meteor().compute_score(references, made)[0],
        "ROUGE-L": Rouge().compute_score(references, made)[0],
        "CIDEr": Cider().compute_score(references, made)[0],
    }
    ours = metrics.caption_scores(case["hypotheses"], case["references"])
    assert ours == pytest.approx(theirs, abs=1e-9, rel=1e-9)


def test_meteor_is_never_a_number_without_java(monkeypatch):
    monkeypatch.setattr(coco, "package", lambda: None)
    case = GOLDEN["one"]
    assert metrics.caption_scores(case["hypotheses"], case["references"])["METEOR"] == "needs Java"
    with pytest.raises(UserError, match=r"install Java and .*stoa-jax"):
        metrics.caption_scores(case["hypotheses"], case["references"], tokenizer="java")


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ({}, {}, "no captions"),
        ({"a": "x"}, {"a": ["x"], "b": ["x"]}, "1 ids without a hypothesis, 'b'"),
        ({"a": "x", "b": "x"}, {"a": ["x"]}, "1 ids without a reference, 'b'"),
        ({"a": "x"}, {"a": []}, "give a list"),
        ({"a": "x"}, {"a": "x"}, "give a list"),
    ],
)
def test_caption_scores_say_what_is_missing(hypotheses, references, message):
    with pytest.raises(UserError, match=message):
        metrics.caption_scores(hypotheses, references)


def test_perfect_and_foreign_captions():
    texts = {str(i): f"a {c} is jumping over the {c} fence" for i, c in enumerate(["dog", "cow"])}
    same = metrics.caption_scores(texts, {i: [t] for i, t in texts.items()}, tokenizer="python")
    assert same["BLEU-4"] == pytest.approx(1) and same["ROUGE-L"] == pytest.approx(1)
    other = {i: ["nothing alike"] for i in texts}
    scores = metrics.caption_scores(texts, other, tokenizer="python")
    assert scores["BLEU-4"] < 1e-6 and scores["ROUGE-L"] == 0 and scores["CIDEr"] == 0


def test_bleu_takes_the_shorter_of_two_equally_close_references():
    # Lengths 4 and 6 are equally far from 5; only the longer one would bring a penalty.
    hypothesis, short, long = "a b c d e", "a b c d", "a b c d e f"
    assert captions.bleu([hypothesis], [[short, long]]) == pytest.approx(1)


# Retrieval


def plain_ranks(similarity, owner):
    """Ranks by counting, one pair after another."""
    texts, videos = similarity.shape
    t2v, v2t = [], []
    for t in range(texts):
        own = similarity[t, owner[t]]
        worse = sum(similarity[t, v] < own for v in range(videos) if v != owner[t])
        t2v.append(videos - worse)
    for v in range(videos):
        mine = [t for t in range(texts) if owner[t] == v]
        best = max(mine, key=lambda t: similarity[t, v])
        others = [t for t in range(texts) if owner[t] != v]
        v2t.append(1 + sum(not similarity[t, v] < similarity[best, v] for t in others))
    return t2v, v2t


def summary(ranks):
    ranks = np.array(ranks)
    recalls = {f"R@{k}": 100 * np.mean(ranks <= k) for k in (1, 5, 10)}
    return recalls | {"MedR": np.median(ranks), "MeanR": np.mean(ranks)}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_equal_a_plain_loop(seed, ties):
    rng = np.random.default_rng(seed)
    videos = int(rng.integers(1, 30))
    owner = np.concatenate([np.arange(videos), rng.integers(0, videos, 2 * videos)])
    rng.shuffle(owner)
    similarity = rng.normal(size=(len(owner), videos))
    if ties:
        similarity = np.round(similarity)
    t2v, v2t = plain_ranks(similarity, owner)
    wanted = {"t2v": summary(t2v), "v2t": summary(v2t)}
    assert metrics.retrieval(similarity, owner) == wanted
    in_blocks = metrics.retrieval_in_blocks(
        lambda rows: similarity[rows], videos, len(owner), owner, block_size=7
    )
    assert in_blocks == wanted


def test_square_similarity_needs_no_owner():
    result = metrics.retrieval(np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.0, 0.1, 0.7]]))
    assert result["t2v"]["R@1"] == pytest.approx(200 / 3)
    assert result["t2v"]["MedR"] == 1 and result["t2v"]["MeanR"] == pytest.approx(4 / 3)
    assert result["v2t"]["R@1"] == 100


def test_ties_and_nans_count_against_us():
    flat = metrics.retrieval(np.zeros((20, 20)))
    for side in ("t2v", "v2t"):
        assert flat[side]["R@10"] == 0 and flat[side]["MeanR"] == 20
    assert metrics.retrieval(np.full((20, 20), np.nan)) == flat
    broken = np.eye(20)
    broken[3, 3] = np.nan
    result = metrics.retrieval(broken)
    assert result["t2v"]["R@1"] == 95 and result["t2v"]["MeanR"] == pytest.approx((19 + 20) / 20)
    assert result["v2t"]["R@1"] == 95


def test_a_video_is_as_good_as_its_best_caption():
    # Three captions of video 0, the second of which is right; one of video 1.
    similarity = np.array([[0.1, 0.6], [0.9, 0.2], [0.1, 0.7], [0.3, 0.5]])
    result = metrics.retrieval(similarity, [0, 0, 0, 1])
    assert result["t2v"]["R@1"] == 50
    assert result["v2t"]["R@1"] == 50 and result["v2t"]["MeanR"] == 2  # ranks 1 and 3
    # CLIP4Clip counts the two better captions of video 0 as one.
    assert metrics.grouped_video_to_text(similarity, [0, 0, 0, 1])["MeanR"] == 1.5


@pytest.mark.parametrize(
    ("shape", "owner", "message"),
    [
        ((3, 4), None, "3 texts and 4 videos"),
        ((3,), None, "2-D"),
        ((2, 3), [0], "one integer for each of the 2 texts"),
        ((2, 3), [0, 3], r"video_of_text\[1\] is 3; there are 3 videos"),
        ((2, 3), [-1, 0], r"video_of_text\[0\] is -1"),
        ((0, 3), [], "one integer|no texts"),
    ],
)
def test_wrong_shapes_are_named(shape, owner, message):
    with pytest.raises(UserError, match=message):
        metrics.retrieval(np.zeros(shape), owner)


def test_a_thousand_by_a_thousand_in_well_under_a_second():
    similarity = np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32)
    start = time.perf_counter()
    metrics.retrieval(similarity)
    assert time.perf_counter() - start < 1


def test_dual_softmax_settles_a_hub():
    # Video 0 attracts both texts; the prior over texts shows that text 0 fits it better.
    similarity = np.array([[0.9, 0.1], [0.8, 0.78]])
    assert metrics.retrieval(similarity)["t2v"]["R@1"] == 50
    both = metrics.dual_softmax(similarity)
    assert metrics.retrieval(both["t2v"])["t2v"]["R@1"] == 100
    np.testing.assert_allclose(
        both["v2t"] / similarity, np.array([[1, 0], [0.88, 0.12]]), atol=0.01
    )


def test_chance_is_what_random_orders_give():
    counts = np.array([3, 1, 2, 4])
    owner = np.repeat(np.arange(4), counts)
    rng = np.random.default_rng(0)
    runs = [metrics.retrieval(rng.normal(size=(10, 4)), owner) for _ in range(1500)]
    expected = metrics.chance(4, counts)
    for side in ("t2v", "v2t"):
        for key, value in expected[side].items():
            assert np.mean([run[side][key] for run in runs]) == pytest.approx(value, abs=3)
