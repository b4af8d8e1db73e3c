"""`--mode=eval` from checkpoints and weights: what it writes, and what it refuses."""

import json

import jax
import numpy as np
import pytest
import toy_tasks

from stoa_jax import checkpoint, evaluate, sharding
from stoa_jax.errors import UserError
from stoa_jax.models.parameters import named_parameters
from stoa_jax.tasks import base, make_task

data, no_java = toy_tasks.data, toy_tasks.no_java


def save(task, workdir, model):
    """Save a checkpoint in the form that a run writes."""
    c = task.config
    meta = {"model": {}, "extras": task.extras()}
    checkpoints = checkpoint.Checkpoints(workdir, c)
    checkpoints.save(7, named_parameters(model), {"step": np.int32(7)}, meta, None)
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture(scope="module")
def choice(data, tmp_path_factory):
    """Return a multiple-choice run's directory, its configuration, and its model."""
    c = toy_tasks.configuration(data, "multiple_choice")
    task, workdir = make_task(c), tmp_path_factory.mktemp("run")
    model = toy_tasks.build(task)
    save(task, workdir, model)
    return c, workdir, model


def test_results_say_all_that_a_comparison_takes(choice, capsys):
    c, workdir, model = choice
    rows = evaluate.run(c, workdir)
    assert rows == json.loads((workdir / "results.json").read_text())
    by_name = {row["metric"]: row for row in rows}
    row = by_name["multiple_choice/accuracy"]
    assert row["n"] == row["split_size"] == 11 and row["partial"] is False
    assert row["split"] == "synthetic/multiple_choice:test"
    split = make_task(c).open_split("synthetic/multiple_choice", "test")
    assert row["split_hash"] == split.fingerprint
    assert "of 5 options" in row["protocol"] and row["seed"] == 0
    assert row["checkpoint"].endswith("checkpoints/7")
    assert row["config"]["task"] == "multiple_choice"
    assert {"jax", "stoa_jax", "pycocoevalcap"} <= set(row["versions"])
    assert row["date"].startswith("20")
    assert "multiple_choice/accuracy" in capsys.readouterr().out
    predictions = json.loads((workdir / "predictions.json").read_text())
    assert len(predictions["multiple_choice"]) == 11
    # The same as from the model in memory.
    mesh = sharding.make_mesh(c, jax.devices()[:1])
    _, direct = toy_tasks.figures(make_task(c), model, mesh)
    assert row["value"] == pytest.approx(direct["multiple_choice/accuracy"].value)


def test_a_part_is_asked_for_and_marked(choice, tmp_path, capsys):
    c, workdir, _ = choice
    c = c.copy_and_resolve_references()
    c.eval.max_examples = 4
    rows = evaluate.run(c, workdir)
    assert all(row["partial"] for row in rows)
    assert {row["n"] for row in rows} == {4} and rows[0]["split_size"] == 11
    assert "(partial)" in capsys.readouterr().out


def test_a_figure_on_a_partial_set_is_refused(data, tmp_path):
    c = toy_tasks.configuration(data, "retrieval", data__eval_set="msvd/retrieval")
    with pytest.raises(UserError, match=r"msvd/retrieval:test: 665 of 670 published clips"):
        evaluate.run(c, tmp_path)
    c.eval.allow_partial = True
    with pytest.raises(UserError, match="no checkpoint"):  # the next thing it needs
        evaluate.run(c, tmp_path)


def test_nothing_to_evaluate_is_one_line(data, tmp_path):
    c = toy_tasks.configuration(data, "retrieval")
    with pytest.raises(UserError, match=r"holds no checkpoint, and config.init.path is empty"):
        evaluate.run(c, tmp_path)


def test_a_checkpoint_of_another_model_is_refused(choice):
    c, workdir, _ = choice
    c = c.copy_and_resolve_references()
    c.model.text_width, c.model.actions = 32, False
    with pytest.raises(UserError, match=r"checkpoints/7: the model differs .* action/"):
        evaluate.run(c, workdir)


def test_other_answers_than_trained_on_are_refused(data, tmp_path):
    c = toy_tasks.configuration(data, "qa")
    task = make_task(c)
    model = toy_tasks.build(task)
    task.answers = ("blue", *task.answers[1:])
    save(task, tmp_path, model)
    with pytest.raises(UserError, match="3 answers that differ from those of synthetic/qa"):
        evaluate.run(c, tmp_path)


def test_untrained_heads_say_nothing(data):
    c = toy_tasks.configuration(data, "retrieval")
    (evaluator,) = make_task(c).evaluators().values()
    evaluator.leave_out(["fusion/match/kernel", "fusion/match/bias"], "clip.pt")
    mesh = sharding.make_mesh(c, jax.devices()[:1])
    rows = [row.metric for row in evaluator.rows(toy_tasks.build(evaluator.task), mesh)]
    assert "retrieval/t2v/R@1" in rows and not any("reranked" in name for name in rows)
    (evaluator,) = make_task(toy_tasks.configuration(data, "captioning")).evaluators().values()
    with pytest.raises(UserError, match=r"captioning: clip.pt brings no trained fusion/lm_proj"):
        evaluator.leave_out(["fusion/lm_proj"], "clip.pt")


def test_a_value_that_is_no_number_is_text(choice, monkeypatch):
    c, _, model = choice
    (evaluator,) = make_task(c).evaluators().values()
    row = base.Row("x", float("nan"), 1, "p")
    monkeypatch.setattr(evaluator, "rows", lambda model, mesh: iter([row]))
    (made,) = evaluate.rows_of(evaluator, model, None)
    assert made["value"] == "nan"
