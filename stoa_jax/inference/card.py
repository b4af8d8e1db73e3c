"""The model card: what a model is, how it was trained, how good it is, and its limits."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stoa_jax.inference.opened import Opened

_UNKNOWN = "Not known: these weights came without a record of their training."
_BELOW = "See the card that came with these weights, below."


def model_card(model: Opened) -> str:
    """Return a README.md for the directory or repository of a model."""
    record = model.record
    original = str(record.get("card", ""))
    license_line = re.search(r"\A---\n(?:.*\n)*?(license:.*)\n", original)
    c = model.config
    unknown = [_BELOW if original else _UNKNOWN]
    lines = [
        "---",
        "library_name: stoa_jax",
        "pipeline_tag: video-text-to-text",
        "tags: [video, stoa_jax]",
        *([license_line[1]] if license_line else []),
        "---",
        f"# {Path(model.source).name or model.kind}",
        "",
        "```python",
        "import stoa_jax",
        "",
        'model = stoa_jax.load("PATH")',
        'vectors = model.encode_video(["clip.mp4"])',
        "```",
        "",
        f"- can: {', '.join(sorted(model.has))}",
        f"- frames: {model.frames} of {c.image_size}x{c.image_size} pixels",
        f"- fingerprint: `{model.fingerprint}`",
        *("", "## Data", "", *(_data(record) or unknown)),
        *("", "## Recipe", "", *(_recipe(record) or unknown)),
        *("", "## Metrics", "", *_metrics(record)),
        *("", "## Match probabilities", "", *_calibration(model)),
        *("", "## Limits", "", *_limits(model)),
    ]
    if original:
        body = re.sub(r"\A---\n.*?\n---\n", "", original, flags=re.S).strip()
        lines += ["", "## The card that came with these weights", "", _deeper(body)]
    return "\n".join(lines) + "\n"


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = record.get("config", {}).get(name, {})
    return part if isinstance(part, Mapping) else {}


def _data(record: Mapping[str, Any]) -> list[str]:
    data = _part(record, "data")
    lines = [
        f"- trained on: `{name}:{data.get('train_split', 'train')}`"
        + ("" if weight == 1 else f", weight {weight:g}")
        for name, weight in data.get("sets", ())
    ]
    if lines and data.get("live") and isinstance(data.get("world"), Mapping):
        world = ", ".join(f"{k} {v}" for k, v in sorted(data["world"].items()))
        lines.append(f"- generated while training: {world}")
    tested = {
        (row["split"], row.get("split_hash", ""), row.get("n"))
        for row in record.get("results", ())
        if "split" in row
    }
    for split in sorted({split for split, _, _ in tested}):
        hashes = ", ".join(sorted({f"`{h}`" for s, h, _ in tested if s == split and h}))
        lines.append(f"- evaluated on: `{split}`" + (f", hash {hashes}" if hashes else ""))
    return lines


def _recipe(record: Mapping[str, Any]) -> list[str]:
    config = record.get("config", {})
    train, optim, losses = (_part(record, name) for name in ("train", "optim", "loss"))
    lines = []
    if config.get("task"):
        lines.append(f"- task: {config['task']}")
    if start := _part(record, "init").get("path"):
        lines.append(f"- started from: `{start}`")
    if "step" in record:
        planned = train.get("steps")
        of = f" of {planned} planned" if planned and planned != record["step"] else ""
        lines.append(f"- steps: {record['step']}{of}")
    if "batch_size" in train:
        lines.append(f"- batch: {train['batch_size'] * train.get('accumulate', 1)} examples")
    used = [
        f"{name} {weight:g}"
        for name, weight in losses.items()
        if isinstance(weight, int | float) and not isinstance(weight, bool) and weight
    ]
    if used:
        lines.append(f"- losses and their settings: {', '.join(used)}")
    groups = [f"`{pattern}` {rate:g}" for pattern, rate in optim.get("groups", ())]
    if groups:
        schedule = f", {optim['schedule']} schedule" if "schedule" in optim else ""
        lines.append(f"- learning rates: {', '.join(groups)}{schedule}")
    if "seed" in config:
        lines.append(f"- seed: {config['seed']}")
    if config:
        lines.append("- the whole configuration: `config` in `run.json`")
    return lines


def _metrics(record: Mapping[str, Any]) -> list[str]:
    rows = record.get("results", ())
    if not rows and "card" in record:
        return [_BELOW]
    if not rows:
        return ["None measured: evaluate the run with `python -m stoa_jax.main --mode=eval`."]
    lines = ["| metric | value | n | split | protocol |", "|---|---|---|---|---|"]
    for row in rows:
        value = row["value"]
        shown = f"{value:.4g}" if isinstance(value, int | float) else str(value)
        part = " (part of the split)" if row.get("partial") else ""
        cells = (
            *(row["metric"], shown, row.get("n", ""), row.get("split", "")),
            str(row.get("protocol", "")) + part,
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return lines


def _calibration(model: Opened) -> list[str]:
    if "match" not in model.has:
        return ["The model has no match head."]
    if model.calibration is None:
        return ["Not calibrated: probabilities are the raw output of the match head."]
    record, c = model.calibration.record, model.calibration
    lines = [f"- temperature: {c.temperature:.3f}"]
    if c.threshold is not None:
        rate = record.get("false_accept_rate")
        at = f", {100 * rate:g} % false accepts a pair" if isinstance(rate, int | float) else ""
        lines.append(f"- threshold of a match: {c.threshold:.4f}{at}")
    if "split" in record:
        lines.append(f"- measured on: `{record['split']}`")
    error = record.get("expected_calibration_error")
    if isinstance(error, Mapping) and {"before", "after"} <= set(error):
        before, after = error["before"], error["after"]
        lines.append(f"- expected calibration error: {before:.3f} before, {after:.3f} after")
    return lines


def _limits(model: Opened) -> Iterator[str]:
    c = model.config
    missing = {"match", "caption", "answer", "trajectories", "actions"} - model.has
    if missing:
        yield f"- It lacks what these calls need: {', '.join(sorted(missing))}."
    yield f"- Texts have at most {c.text_length - 2} pieces; longer ones raise or are cut."
    yield f"- A video of any length is {model.frames} frames; the model sees nothing between them."
    if "trajectories" in model.has:
        yield "- Objects come from detections that you pass; without them they are padding."
    if "answer" in model.has and model.answers:
        yield f"- It answers with one of {len(model.answers)} answers and knows no others."
    if model.record.get("results"):
        yield "- The metrics hold for the splits above; on other videos they were not measured."
    for name in model.record.get("unreadable", ()):
        yield f"- `{name}` of the run could not be read, so this card lacks what it says."


def _deeper(text: str) -> str:
    """Return Markdown with its headings two levels deeper; code blocks stay as they are."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    parts[::2] = [re.sub(r"^(#+ )", r"##\1", part, flags=re.M) for part in parts[::2]]
    return "".join(parts)
