"""The report of a sweep, from made-up values."""

import json
import math

import pytest

from stoa_jax import paper_tables


def run(part, row, task, seed, done=True, **result):
    name = f"{part} | {row} | {task} | seed={seed}"
    return {"name": name, "done": done, "result": {f"eval/{k}": v for k, v in result.items()}}


def rows():
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):
        for row, value in (("base", 0.4), ("+ ASP (full)", 0.5)):
            figures = {
                "captioning/greedy/CIDEr": 0.1,
                "captioning/beam5/CIDEr": value + noise,
                "captioning/beam5/BLEU-4": 0.3 + noise,
                "captioning/most_frequent/CIDEr": 0.05,
            }
            yield run("table4", row, "captioning:synthetic", seed, **figures)
            yield run("table4", row, "qa:synthetic", seed, **{"qa/accuracy": 50 + noise})
        for n in (0, 5, 30):
            figures = {"retrieval/t2v/R@1": n + noise, "retrieval/reranked/t2v/R@1": 2 * n + noise}
            yield run("trajectories", n, "retrieval:synthetic", seed, **figures)
    yield run("actions", 8, "retrieval:synthetic", 0, done=False)


def test_mean_and_interval_are_students():
    found = paper_tables.mean_value({"a": 1.0, "b": 2.0, "c": 3.0})
    assert found.mean == 2 and found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(paper_tables.mean_value({"a": 1.0}).half) and "one seed" in str(
        paper_tables.mean_value({"a": 1.0})
    )


def test_it_says_what_differs_beyond_the_intervals(tmp_path):
    text = paper_tables.write(list(rows()), tmp_path)
    assert text.startswith((tmp_path / "tables.md").read_text()[:40])
    assert "captioning:synthetic CIDEr: + ASP (full) 0.5 ± 0.025 against base 0.4 ± 0.025" in text
    assert "above, beyond the intervals" in text
    assert "BLEU-4: + ASP (full) 0.3 ± 0.025 against base 0.3 ± 0.025: no difference" in text
    assert "21 of 22 runs are done" in text


def test_seeds_are_compared_one_by_one(tmp_path):
    """Noise that is specific to a seed cancels; a seed without a base is left out."""
    made = [*rows(), run("table4", "+ ASP (full)", "qa:synthetic", 3, **{"qa/accuracy": 99.0})]
    text = paper_tables.write(made, tmp_path)
    _, _, differences = text.partition("Difference from base, seed by seed:")
    differences, _, curve = differences.partition("Difference from 0, seed by seed:")
    (full,) = [line for line in differences.splitlines() if line.startswith("| + ASP (full) |")]
    bleu, cider, accuracy = [cell.strip() for cell in full.split("|")[2:5]]
    means = [float(cell.split(" ± ")[0]) for cell in (bleu, cider, accuracy)]
    halves = [float(cell.split(" ± ")[1]) for cell in (bleu, cider, accuracy)]
    assert means == pytest.approx([0, 0.1, 0], abs=1e-9)
    assert halves == pytest.approx([0, 0, 0], abs=1e-9)
    (five,) = [line for line in curve.splitlines() if line.startswith("| 5 |")]
    means = [float(cell.split(" ± ")[0]) for cell in five.split("|")[2:4]]
    assert means == pytest.approx([5, 10])


def test_curves_become_plots_on_the_page(tmp_path):
    paper_tables.write(list(rows()), tmp_path)
    assert (tmp_path / "trajectories.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "actions.png").exists()
    page = (tmp_path / "index.html").read_text()
    assert 'src="trajectories.png"' in page and "<td>base</td>" in page
    assert "reranked/t2v/R@1" in page  # fusion is where trajectories and actions matter


def joint_rows(tmp_path, seeds):
    workdir = tmp_path / "run"
    workdir.mkdir(exist_ok=True)
    world = {"seed": 0, "size": 32, "siblings": 1, "max_objects": 3}
    world |= {"train": 10, "validation": 10, "test": 40}
    data = {"live": True, "eval_split": "test", "world": world}
    model = {"frames": 2, "objects_per_frame": 4}
    (workdir / "config.json").write_text(json.dumps({"data": data, "model": model}))
    for seed in range(seeds):
        for row, value in (("plus", 60.0), ("plus, no adjectives", 59.0), ("base", 50.0)):
            result = {"qa/accuracy": value + seed, "qa/kind/way/accuracy": 50.0}
            result |= {"multiple_choice/accuracy": 20.0, "captioning/greedy/CIDEr": 1.5}
            made = run("joint", row, "joint:synthetic", seed, **result)
            yield {**made, "workdir": str(workdir)}


def test_one_seed_has_the_interval_of_its_questions(tmp_path):
    found = paper_tables.gather(list(joint_rows(tmp_path, 1)))["joint"]["base"]
    assert found["questions"].questions == 40 * 5  # of the live test split
    assert found["questions"].half == pytest.approx(196 * (0.25 / 200) ** 0.5)
    assert found["choice of five"].half == pytest.approx(196 * (0.16 / 40) ** 0.5)
    assert 0 < found["which way"].questions < 200 and math.isnan(found["CIDEr"].half)


def test_rows_of_joint_are_compared_with_the_base_seed_by_seed(tmp_path):
    text = paper_tables.write(list(joint_rows(tmp_path, 3)), tmp_path)
    assert "| base | 51 ± 2.5 |" in text
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:4] == ["| base", "| plus, no adjectives", "| plus"]
    _, _, differences = text.partition("Difference from base, seed by seed:")
    (line,) = [line for line in differences.splitlines() if line.startswith("| plus |")]
    assert line.startswith("| plus | 10 ± 0 | 0 ± 0 |")


def test_what_cancels_reads_as_nothing():
    assert str(paper_tables.mean_value({"a": 0.1 + 0.2 - 0.3, "b": 0.3 - 0.1 - 0.2})).startswith(
        "0 ±"
    )
