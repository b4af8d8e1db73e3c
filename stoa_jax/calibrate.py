"""Calibrate the match head: a temperature for its probabilities, and a threshold.

    python -m stoa_jax.main --mode=calibrate --config=configs/pretrain.py:synthetic --workdir=runs/p

Uses pairs of the split `eval.calibration_split`: every caption with its clip, and with clips that
it does not describe. The temperature minimizes the log loss, with equal weight for matches and
mismatches; the threshold accepts at most `eval.false_accept_rate` of the mismatches. Writes
`calibration.json` into the work directory, where evaluation and `stoa_jax.load` read it.
Checkpoints are not changed.
"""

import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from stoa_jax import evaluate, sharding
from stoa_jax.errors import UserError
from stoa_jax.files import write_json
from stoa_jax.inference import sidecars
from stoa_jax.metrics.calibration import (
    even_weights,
    expected_calibration_error,
    fit_temperature,
    match_probability,
    threshold_at,
)
from stoa_jax.tasks import make_task
from stoa_jax.tasks.retrieval import Retrieval, RetrievalEvaluator


def run(c: ConfigDict, workdir: str | Path, *, verbose: bool = True) -> dict[str, Any]:
    """Calibrate the model of a work directory, write `calibration.json`, and return its content."""
    workdir = Path(workdir).absolute()
    rate = c.eval.false_accept_rate
    if not 0 <= rate < 1:
        raise UserError(f"config.eval.false_accept_rate: {rate}; it must be at least 0 and below 1")
    task = make_task(c)
    mesh = sharding.make_mesh(c)
    sharding.check_batch(c, mesh)
    evaluator = evaluator_for(c)
    pairs = evaluator.labelled_pairs
    if pairs is None:
        raise UserError(
            f"{evaluator.split_name}: every caption describes every clip, so no pair mismatches; "
            "calibrate on a larger split with --config.eval.calibration_split=…"
        )
    with jax.set_mesh(mesh):
        model, source, untrained = evaluate.load(c, workdir, task, mesh)
        if any(name.startswith("fusion/match") for name in untrained):
            raise UserError(
                f"{source}: has no trained match head to calibrate; pre-train or fine-tune "
                "with the loss VTM"
            )
        encoded = evaluator.encode_all(model, mesh, for_fusion=True)
        margins = evaluator.margins(model, mesh, encoded, pairs.text, pairs.video)
    found = fit(margins, pairs.matches, rate)
    found |= {
        "version": sidecars.CALIBRATION_VERSION,
        "split": evaluator.split_name,
        "split_hash": evaluator.split.fingerprint,
        "checkpoint": source,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if jax.process_index() == 0:
        evaluate.make_directory(workdir)
        write_json(workdir / sidecars.CALIBRATION, found)
        if verbose:
            print(describe(found, workdir / sidecars.CALIBRATION), flush=True)
    return found


def fit(margins: np.ndarray, matches: np.ndarray, false_accept_rate: float) -> dict[str, Any]:
    """Fit temperature and threshold to labelled pairs; return both and what they achieve."""
    weights = even_weights(matches)
    temperature = fit_temperature(margins, matches, weights)
    before, after = match_probability(margins), match_probability(margins, temperature)
    threshold = min(1.0, threshold_at(after[~matches], false_accept_rate))
    accepted = after >= threshold
    return {
        "temperature": temperature,
        "threshold": threshold,
        "false_accept_rate": false_accept_rate,
        "pairs": len(matches),
        "matches": int(matches.sum()),
        "expected_calibration_error": {
            "before": expected_calibration_error(before, matches, weights),
            "after": expected_calibration_error(after, matches, weights),
        },
        "accepted_matches": float(accepted[matches].mean()),
        "accepted_mismatches": float(accepted[~matches].mean()),
    }


def evaluator_for(c: ConfigDict) -> RetrievalEvaluator:
    """Create the evaluator of the calibration split, for any task of the configuration."""
    c = c.copy_and_resolve_references()
    c.data.eval_set = c.eval.calibration_set or c.data.eval_set or c.data.sets[0][0]
    c.data.eval_split = c.eval.calibration_split
    evaluator = RetrievalEvaluator(Retrieval(c))
    if evaluator.split.kind != "caption":
        raise UserError(
            f"{evaluator.split_name}: calibration needs captions, and this set holds "
            f"{evaluator.split.kind}; name a set of captions with --config.eval.calibration_set=…"
        )
    return evaluator


def describe(found: dict[str, Any], path: Path) -> str:
    """Format a calibration for printing."""
    error = found["expected_calibration_error"]
    mismatches = found["pairs"] - found["matches"]
    return (
        f"{found['matches']} matches and {mismatches} mismatches of {found['split']}\n"
        f"temperature {found['temperature']:.4g}; expected calibration error "
        f"{error['before']:.4f} before, {error['after']:.4f} after\n"
        f"threshold {found['threshold']:.4g}: accepts {found['accepted_matches']:.1%} of the "
        f"matches and {found['accepted_mismatches']:.2%} of the mismatches\n"
        f"wrote {path}"
    )
