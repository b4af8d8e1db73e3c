"""The demonstration: its page and table, then both variants as a user starts them, shortened."""

import html.parser
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from stoa_jax.demo import acts, page, tables

RESULTS = [
    {"metric": "qa/accuracy", "value": 50.0, "n": 10},
    {"metric": "qa/majority/accuracy", "value": 10.0, "n": 10},
    {"metric": "qa/single_frame/accuracy", "value": 40.0, "n": 10},
    {"metric": "captioning/greedy/CIDEr", "value": 1.25, "n": 4},
]


class WellFormed(html.parser.HTMLParser):
    """Parser that checks that tags are closed in order and ids are unique."""

    VOID = ("meta", "img", "source", "line", "polyline", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], set()

    def handle_starttag(self, tag, attributes):
        if (name := dict(attributes).get("id")) is not None:
            assert name not in self.ids
            self.ids.add(name)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def made_card():
    frames = [np.full((12, 12, 3), 40 * t, np.uint8) for t in range(4)]
    match = types.SimpleNamespace(
        name="<star>",
        boxes=np.tile([0.1, 0.1, 0.6, 0.6], (4, 1)),
        shown=np.array([True, True, False, True]),
        score=0.9,
        word=None,
        word_score=0.25,
    )
    explanation = types.SimpleNamespace(trajectories=[match], actions=[match], times=np.arange(4.0))
    about = types.SimpleNamespace(video_id="a", texts=("a <b> star rises",))
    questions = [("what rises?", "star", "star"), ("what falls?", "moon", "ring")]
    return page.card(frames, explanation, about, "a star & a moon ", questions)


def test_the_page_is_well_formed_and_says_what_is_right():
    curves = {"tiny": page.Curve([10, 20], [5.0, 20.0]), "shipped": page.Curve([100], [70.0])}
    text = page.document(RESULTS, made_card(), page.training("It went far.", curves))
    checker = WellFormed()
    checker.feed(text)
    assert not checker.open
    assert "a &lt;b&gt; star rises" in text and "<star>" not in text
    assert "“a star &amp; a moon”" in text
    assert text.count("✓") == 1 and text.count("✗") == 1 and "it is ring" in text
    assert "image/webp" in text and "prefers-reduced-motion" in text
    assert "shipped: 70 % after 100 steps" in text


def test_the_table_shows_what_was_measured_beside_its_baselines():
    rows = {row[0]: row for row in tables.rows(RESULTS)}
    assert set(rows) == {"question answering, accuracy", "CIDEr, greedy"}
    wanted = ("10", "50.0", "10.0 (majority answer)", "–", "40.0")
    assert rows["question answering, accuracy"][1:] == wanted
    assert rows["CIDEr, greedy"][2:4] == ("1.250", "– (most frequent caption)")
    lines = tables.markdown(RESULTS).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_an_animation_has_every_frame_and_its_boxes():
    import base64
    import io
    import re

    from PIL import Image

    data = re.search(r"data:image/webp;base64,([^\"]+)", made_card())[1]
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.n_frames == 4 and picture.size == (page.HEIGHT, page.HEIGHT)


def test_answers_are_grouped_by_video_whatever_the_question_holds():
    rows = {
        "0: a: what: is it?": {"answer": "x", "right": "y"},
        "1: b: who?": {"answer": "x", "right": "x"},
    }
    assert page.by_video(rows) == {"a": [("what: is it?", "x", "y")], "b": [("who?", "x", "x")]}


def test_the_small_training_has_the_papers_six_losses_and_questions():
    c = acts.tiny_config(0.1)
    on = {
        name
        for name, weight in c.loss.to_dict().items()
        if name in ("vtc", "vtm", "mlm", "plm", "ota", "asp") and weight
    }
    assert len(on) == 6 and c.loss.answer == 1 and c.loss.verb == 0
    assert not c.init.path and not c.init.reinit
    assert c.data.world.seed == acts.SEED != 0


def test_the_shipped_curve_joins_the_stages_of_a_training(tmp_path):
    from stoa_jax.checkpoints.__main__ import POINTS, training_curve

    before = ""
    for stage, rows in (
        ("words", [(10, 0.1), (20, 0.3)]),
        ("motion", []),
        ("heads", [(5, 0.5), (10, 0.5)]),
    ):
        folder = tmp_path / stage
        folder.mkdir()
        lines = [{"step": step, "accuracy": value} for step, value in rows]
        lines.append({"step": 99, "loss": 1.0})
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "config.json").write_text(json.dumps({"init": {"path": before}}))
        before = str(folder)
    found = training_curve(tmp_path / "heads")
    assert found == {"steps": [10, 20, 25, 30], "values": [10, 30, 50, 50]}
    (tmp_path / "words" / "metrics.jsonl").write_text(
        "\n".join(json.dumps({"step": i, "accuracy": 0.2}) for i in range(1000))
    )
    long = training_curve(tmp_path / "words")
    assert len(long["steps"]) == POINTS and set(long["values"]) == {20}
    assert training_curve(tmp_path) == {}


def run(tmp_path, *options):
    command = [sys.executable, "-m", "stoa_jax.demo", f"--workdir={tmp_path}", *options]
    user = {**os.environ, "XLA_FLAGS": ""}  # users do not have the tests' eight devices
    ran = subprocess.run(command, capture_output=True, text=True, timeout=800, env=user)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.slow
def test_both_acts_run_through_and_a_second_time_trains_nothing_again(tmp_path):
    said = run(tmp_path, "--steps=0.01", "--clips=0.05")
    table = (tmp_path / "results.md").read_text()
    assert table in said and "qa" not in table and "which way" in table
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/webp") == acts.SHOWN and "Act two" in text
    assert "bring the tiny model" in text and "bring the tiny model" in said
    checkpoints = sorted((tmp_path / "tiny" / "checkpoints").glob("*"))
    before = {path: path.stat().st_mtime_ns for path in checkpoints}
    assert before
    run(tmp_path, "--steps=0.01", "--clips=0.05")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "results.md").read_text() == table


@pytest.mark.slow
def test_the_whole_way_runs_through_and_a_second_time_does_nothing_again(tmp_path):
    options = ("--full", "--steps=0.01", "--clips=0.01")
    said = run(tmp_path, *options)
    table = (tmp_path / "results.md").read_text()
    assert table in said
    assert all(line.label in table for line in tables.LINES)
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/") >= 10 and "multiple choice" in text and "Pre-training" in text
    checkpoints = sorted(tmp_path.glob("*/checkpoints/*"))
    stages = {path.parts[-3] for path in checkpoints}
    assert stages == {"clip", "pretrain", "retrieval", "captioning", "qa", "multiple_choice"}
    for stage in stages:
        assert json.loads((tmp_path / stage / "result.json").read_text())["step"] >= 2

    before = {path: path.stat().st_mtime_ns for path in checkpoints}
    run(tmp_path, *options)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "results.md").read_text() == table
