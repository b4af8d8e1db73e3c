"""`stoa report` on real small runs, and on work directories that are damaged or empty."""

import argparse
import json
import re
from html.parser import HTMLParser

import pytest
import toy_run
import toy_tasks

from stoa_jax import evaluate
from stoa_jax.cli import report as command
from stoa_jax.errors import UserError
from stoa_jax.report import examples, tables, write_report
from stoa_jax.tasks import make_task

data, no_java = toy_tasks.data, toy_tasks.no_java


class Page(HTMLParser):
    """Parser that collects tags and text, and fails on tags that are not closed in order."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "link")

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def find(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def written(workdir, **options):
    path, notes = write_report(workdir, **options)
    return Page(path.read_text(encoding="utf-8")), notes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a work directory of the real loop."""
    workdir = tmp_path_factory.mktemp("trained")
    toy_run.run(workdir)
    return workdir


def evaluated(data, name, workdir):
    c = toy_tasks.configuration(data, name)
    task = make_task(c)
    model = toy_tasks.build(task)
    evaluate.run(c, workdir, model, task=task, source="random", verbose=False)
    return task


def test_a_trained_run_has_a_plot_for_each_metric_and_its_cost(trained):
    page, notes = written(trained)
    assert notes == ["results.json is missing: evaluate the run with --mode=eval"]
    captions = [a["aria-label"] for a in page.find("svg")]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (loss,) = [c for c in captions if c.startswith("loss:")]
    assert f"{rows[0]['loss']:.4g} at step 1" in loss
    last = [row["loss"] for row in rows if "loss" in row][-1]
    assert f"{last:.4g} at step 20" in loss
    assert any(c.startswith("batch_r1:") for c in captions)
    assert "eval/sum" in page.text and "time per step" in page.text and "step 20" in page.text
    assert "optim.groups" in page.text  # the configuration


def test_the_file_is_self_contained_and_ids_are_unique(trained):
    page, _ = written(trained)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 20
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    links += [v for _, attrs in page.tags for k, v in attrs.items() if k == "xlink:href"]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert not page.find("script") and not page.find("link")


def test_plots_keep_their_text_and_take_the_colour_of_the_page(trained):
    content = (write_report(trained)[0]).read_text()
    svg = content[content.index("<svg") : content.index("</svg>")]
    assert re.search(r"<text[^>]*>step</text>", svg) and "currentColor" in svg
    assert "#010203" not in content and "#040506" not in content
    assert "prefers-color-scheme: dark" in content


def test_retrieval_shows_ranks_and_baselines(data, tmp_path):
    evaluated(data, "retrieval", tmp_path)
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    results = {row["metric"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert set(predictions) == {"retrieval", "retrieval/reranked"}
    for name, rows in predictions.items():
        # The page must show the measured values.
        ranks = [row["rank"] for row in rows.values()]
        r1 = 100 * sum(rank == 1 for rank in ranks) / len(ranks)
        assert r1 == pytest.approx(results[f"{name}/t2v/R@1"]["value"])
        assert sum(ranks) / len(ranks) == pytest.approx(results[f"{name}/t2v/MeanR"]["value"])
        for key, row in rows.items():
            assert (row["retrieved"][0] == examples.parts_of(key)[0]) == (row["rank"] == 1)
    page, notes = written(tmp_path, clips=0)
    assert "retrieval/reranked/t2v/R@1" in page.text and "(chance)" in page.text
    assert "rank 1" in page.text and page.find("img")
    assert all("metrics.jsonl" in note for note in notes)


def test_captions_are_ordered_by_how_near_they_are_to_the_references(data, tmp_path):
    task = evaluated(data, "captioning", tmp_path)
    (evaluator,) = task.evaluators().values()
    path = tmp_path / "predictions.json"
    predictions = json.loads(path.read_text())
    first, second, *_ = predictions["captioning/greedy"]
    predictions["captioning/greedy"][first] = evaluator.references[first][0]
    predictions["captioning/greedy"][second] = "zzz"
    path.write_text(json.dumps(predictions))
    found, notes = examples.groups(predictions, evaluator.references)
    group = next(g for g in found if g.name == "captioning/greedy")
    assert group.good[0].video == first and group.good[0].score == "ROUGE-L 100"
    assert group.bad[0].score == "ROUGE-L 0" and not notes
    page, _ = written(tmp_path, clips=0)
    assert evaluator.references[first][0] in page.text and "Worst by ROUGE-L" in page.text


def test_answers_and_choices_show_what_was_right(data, tmp_path):
    for name in ("qa", "multiple_choice"):
        task = evaluated(data, name, tmp_path / name)
        page, _ = written(tmp_path / name, clips=0)
        assert "Wrong" in page.text and page.find("img")
        if name == "multiple_choice":
            (evaluator,) = task.evaluators().values()
            options = evaluator.split.metadata(0).texts
            assert any(option in page.text for option in options)


def row(metric, value, n=10):
    return {"metric": metric, "value": value, "n": n, "protocol": "p", "partial": False}


def test_a_baseline_stands_beside_every_way_of_the_same_metric():
    found = tables.lines(
        [
            row("retrieval/t2v/MedR", 3.0),
            row("retrieval/reranked/t2v/MedR", 60.0),
            row("retrieval/single_frame/reranked/t2v/MedR", 5.0),
            row("retrieval/chance/t2v/MedR", 50.0),
            row("qa/authors/accuracy", 9.0),
            row("qa/majority/accuracy", 8.0),
            row("captioning/greedy/METEOR", "needs Java"),
            row("captioning/most_frequent/METEOR", 0.1),
        ]
    )
    by_name = {line.metric: line for line in found}
    assert len(found) == 4
    assert by_name["retrieval/t2v/MedR"].beats_trivial is True  # a lower rank is better
    assert by_name["retrieval/reranked/t2v/MedR"].beats_trivial is False
    assert by_name["retrieval/reranked/t2v/MedR"].ablated == {"one frame": 5.0}
    assert by_name["qa/authors/accuracy"].trivial is None  # another protocol
    assert by_name["captioning/greedy/METEOR"].beats_trivial is None


def test_texts_of_a_run_are_escaped(tmp_path):
    (tmp_path / "predictions.json").write_text(
        json.dumps({"captioning/greedy": {"<b>x": "<script>alert(1)</script>"}})
    )
    (tmp_path / "config.json").write_text(json.dumps({"task": "<i>captioning"}))
    page, _ = written(tmp_path)
    assert not page.find("script") and not page.find("i")
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "not the work directory of a run; expected at least one of config.json"),
        ({"config.json": ""}, r"nothing to report \(config.json cannot be read"),
        ({"metrics.jsonl": ""}, r"nothing to report \(all its files are empty\)"),
        ({"results.json": "{"}, r"nothing to report \(results.json cannot be read"),
        ({"results.json": "3"}, r"nothing to report \(results.json: 1 entries without"),
        ({"config.json": "[1]"}, r"config.json holds a list, not an object"),
        ({"predictions.json": "[" * 100_000}, r"predictions.json cannot be read"),
        ({"retrieval/config.json": "{}"}, r"it holds the runs retrieval: name one"),
    ],
)
def test_nothing_to_report_is_one_line(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_directory_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: not a directory"):
        write_report(tmp_path / "file")


def test_damage_is_named_and_the_rest_shown(trained, tmp_path):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:20]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "[1]", '{"loss": NaN', "\x00"]))
    (tmp_path / "results.json").write_text(json.dumps([row("a/b", 1.0), {"metric": 1}, 7]))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    page, notes = written(tmp_path)
    text = " ".join(notes)
    assert "metrics.jsonl: 4 damaged lines left out (line 5, 22, 23, 24)" in text
    assert "results.json: 2 entries without a metric and a value" in text
    assert "config.json cannot be read" in text
    assert all(note in page.text for note in notes)
    assert any(a["aria-label"].startswith("loss:") for a in page.find("svg"))


def test_a_report_that_cannot_be_written_is_one_line(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; name another file with --output"):
        write_report(trained, tmp_path / "file" / "report.html")


def test_the_command_prints_the_path(trained, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(["report", str(trained), "--output", str(tmp_path / "r.html")])
    assert not arguments.run(arguments)
    out = capsys.readouterr()
    assert out.out.strip() == str(tmp_path / "r.html") and "note: results.json" in out.err
    arguments = parser.parse_args(["report", str(trained), "--json"])
    arguments.run(arguments)
    assert json.loads(capsys.readouterr().out)["report"].endswith("report.html")
