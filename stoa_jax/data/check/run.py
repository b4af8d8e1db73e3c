"""Compare built and published data with what an experiment needs."""

import collections
import concurrent.futures
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from stoa_jax.config import data_folder
from stoa_jax.data import pipeline, records, sources, video
from stoa_jax.data.check import contact_sheet
from stoa_jax.data.check.report import Part, Report, names_of, write
from stoa_jax.errors import UserError

SAMPLE, PROBE = 20_000, 20_000


def parts_of(c: ConfigDict, trained_on: Sequence[str] = ()) -> list[Part]:
    """Return the splits that an experiment trains on and is evaluated on."""
    train = [Part(name, c.data.train_split, False) for name, _ in c.data.sets]
    for text in trained_on:
        dataset, _, split = text.partition(":")
        train.append(Part(dataset, split or "train", False))
    evaluated = Part(c.data.eval_set or c.data.sets[0][0], c.data.eval_split, True)
    return [*dict.fromkeys(train), evaluated]


def check(
    c: ConfigDict,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    detections: str | os.PathLike[str] | None = None,
    trained_on: Sequence[str] = (),
    sample: int = SAMPLE,
    probe: int = PROBE,
    out: str | os.PathLike[str] | None = None,
) -> Report:
    """Check the data that a configuration names; write contact sheets and check.json to `out`."""
    data_dir = Path(data_dir or data_folder(c)).expanduser()
    out = Path(out or data_dir / "check")
    parts, report = parts_of(c, trained_on), Report()
    ids: dict[Part, list[str]] = {}
    if manual_dir is not None:
        for dataset in dict.fromkeys(p.dataset for p in parts):
            source = sources.open_source(dataset, manual_dir, detections=detections)
            if not isinstance(source, sources.VideoSource):
                continue  # generated clips have no published files
            of_set = [p for p in parts if p.dataset == dataset]
            ids |= _check_source(source, manual_dir, of_set, report, probe)
    missing = []
    for part in parts:
        try:
            split = pipeline.open_split(data_dir, part.dataset, part.split)
        except UserError as error:
            missing.append((part, error))
            continue
        ids[part] = _check_split(split, part, report, sample, c.model.text_length)
        sheet = out / f"{part.dataset.replace('/', '-')}-{part.split}.png"
        _sheet(split, sheet)
        report.sheets.append(str(sheet))
    if len(missing) == len(parts) and manual_dir is None:
        raise missing[0][1]
    for part, error in missing:
        report.add(part, str(error))
    _check_overlap(ids, report)
    if c.eval.max_examples:
        report.add(
            parts[-1], f"eval.max_examples={c.eval.max_examples} evaluates only a part of it"
        )
    write(report, out)
    return report


def _check_source(
    source: sources.VideoSource, manual_dir, parts: Sequence[Part], report: Report, probe: int
) -> dict[Part, list[str]]:
    ids = {}
    for part in parts:
        entries = source.splits.get(part.split, ())
        listed, absent, there, items = [], [], [], 0
        for i, entry in enumerate(
            entries
        ):  # one pass: there may be millions of entries, on slow storage
            listed.append(entry.video_id)
            items += len(entry.answers) or len(entry.texts)
            if os.path.isfile(entry.video_path):
                there.append(i)
            else:
                absent.append(entry.video_id)
        ids[part], found = listed, report.of(part)
        found |= {"listed": len(listed), "listed_items": items, "missing_videos": absent}
        if not listed:
            report.add(part, f"no such split in {manual_dir}")
            continue
        _compare(part, "listed", len(listed), items, report)
        if absent:
            report.add(part, f"{len(absent)} videos are missing: {names_of(absent)}")
        step = max(1, -(-len(there) // probe)) if probe else 1
        tried = there[::step] if probe else []
        bad = _unreadable([entries[i] for i in tried])
        found["probed"], found["unreadable"] = len(tried), bad
        if bad:
            first = next(iter(bad.values()))
            report.add(
                part, f"{len(bad)} videos are unreadable: {names_of(bad)}; the first: {first}"
            )
        if step > 1:
            report.notes.append(f"{part}: every {step}th of {len(there)} videos was opened")
    wrong = [s for s in source.skipped if not isinstance(s, sources.Undetected)]
    bare = sorted(s.video for s in source.skipped if isinstance(s, sources.Undetected))
    details = {"skipped": [str(s) for s in wrong], "without_detections": bare}
    report.parts.setdefault(f"{source.name} (files)", {}).update(details)
    if wrong:
        report.notes.append(f"{source.name}: {len(wrong)} rows were skipped; the first: {wrong[0]}")
    if bare:
        report.notes.append(f"{source.name}: {len(bare)} videos lack detections: {names_of(bare)}")
    return ids


def _unreadable(entries: Sequence[sources.Entry]) -> dict[str, str]:
    def reason(entry: sources.Entry) -> str:
        try:
            video.probe(entry.video_path)
        except video.VideoError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        reasons = list(pool.map(reason, entries))
    return {e.video_id: r for e, r in zip(entries, reasons, strict=True) if r}


def _compare(part: Part, word: str, clips: int, items: int, report: Report) -> None:
    """Compare the counts of a part with the published ones."""
    due_clips, due_items = sources.published(part.dataset, part.split)
    for unit, due, count in (("clips", due_clips, clips), ("items", due_items, items)):
        report.of(part)[f"expected_{unit}"] = due
        if due is not None and count != due:
            report.add(part, f"{count} {unit} {word} instead of the published {due}")


def _check_split(
    split: pipeline.Split, part: Part, report: Report, sample: int, text_length: int
) -> list[str]:
    found = report.of(part)
    rows = [split.metadata(i) for i in range(len(split))]
    items = sum(len(m.answers) or len(m.texts) for m in rows)
    found |= {"built": len(rows), "items": items, "fingerprint": split.fingerprint}
    _compare(part, "built", len(rows), items, report)
    failures = [f for f in _failures(split) if f.get("clip")]
    found["failed"] = [f"{f['video']}: {f['error']}" for f in failures]
    if failures:
        names = names_of(f["video"] for f in failures)
        report.add(part, f"{len(failures)} clips failed to build: {names}")
    if part.evaluated and part.dataset == "msrvtt/retrieval":
        several = [m.video_id for m in rows if len(m.texts) != 1]
        if several:
            report.add(part, f"1k-A has one caption per video, unlike {names_of(several)}")
    twice = [v for v, n in collections.Counter(m.video_id for m in rows).items() if n > 1]
    if twice:
        report.add(part, f"{len(twice)} clips are in it twice: {names_of(twice)}")
    step = max(1, -(-len(split) // sample))
    found["statistics"] = _statistics(split, range(0, len(split), step), text_length)
    bare = found["statistics"]["clips_without_objects"]
    if not found["statistics"]["objects_per_frame"]:
        report.notes.append(f"{part}: no objects at all; they are padding")
    elif bare:
        report.notes.append(f"{part}: {len(bare)} clips without any object: {names_of(bare)}")
    return [m.video_id for m in rows]


def _failures(split: pipeline.Split) -> Iterable[dict]:
    """Yield the failures that the build recorded for this split."""
    for path in sorted((split.directory / "clips").glob(f"{split.split}-*.jsonl")):
        with open(path) as file:
            yield from json.loads(file.readline()).get("failures", ())
    path = split.directory / "failures.jsonl"  # written by `tfds build`
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row.get("split") == split.split:
                yield row


def _statistics(split: pipeline.Split, indices: Sequence[int], text_length: int) -> dict[str, Any]:
    """Compute statistics of captions and objects over some clips."""
    lengths, words, nouns, verbs, texts = [], [], 0, 0, []
    objects, scores, classes, without, frames, empty = [], [], collections.Counter(), [], 0, 0
    for i in indices:
        record = split.read(i)
        tokens, tags = record["tokens"], record["tags"]
        lengths += ((tokens == records.END).argmax(1) + 1).tolist()
        words += [len(t.split()) for t in record["texts"]]
        texts.append(len(tokens))
        nouns += int(np.isin(tags, (1, 2)).sum())
        verbs += int((tags == 3).sum())
        real = record["classes"] >= 0
        objects += real.sum(1).tolist()
        scores += record["scores"][real].tolist()
        classes.update(record["classes"][real].tolist())
        frames += len(real)
        empty += int((~real.any(1)).sum())
        if not real.any():
            without.append(record["video_id"].decode())
    names = split.class_names
    top = classes.most_common(10)
    return {
        "clips": len(indices),
        "texts_per_clip": _mean(texts),
        "words_per_text": _mean(words),
        "longest_text_words": max(words),
        "tokens_per_text": _mean(lengths),
        "texts_cut": float(np.mean(np.array(lengths) > text_length)),
        "nouns_per_text": nouns / max(1, sum(texts)),
        "verbs_per_text": verbs / max(1, sum(texts)),
        "objects_per_frame": _mean(objects),
        "frames_without_objects": empty / max(1, frames),
        "classes": len(classes),
        "top_classes": {names[c] if c < len(names) else str(c): n for c, n in top},
        "mean_score": _mean(scores),
        "clips_without_objects": without if objects and any(objects) else [],
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _check_overlap(ids: dict[Part, list[str]], report: Report) -> None:
    """Report evaluation clips that are also in a training list of the same videos."""
    for part, clips in ids.items():
        if not part.evaluated:
            continue
        for other, trained in ids.items():
            same_videos = other.dataset.split("/")[0] == part.dataset.split("/")[0]
            if other.evaluated or not same_videos:
                continue
            known = set(trained)
            both = [v for v in clips if v in known]
            report.of(part).setdefault("in_training", {})[str(other)] = both
            if both:
                report.problems.append(
                    f"{part}: {len(both):,} of {len(clips):,} clips are also in the training "
                    f"list {other}: {names_of(both)}"
                )
            # The same film, cut at other times.
            films = {v.partition("@")[0] for v in trained}
            parts = [v for v in clips if v not in known and v.partition("@")[0] in films]
            if parts:
                report.notes.append(f"{part}: other segments of {len(parts)} clips are in {other}")


def _sheet(split: pipeline.Split, path: Path) -> None:
    from stoa_jax import text

    count = min(contact_sheet.CLIPS, len(split))
    clips, nouns = [], []
    tokenizer, tagger = text.Tokenizer(), text.Tagger()
    for i in range(count):
        record = split.read(i * len(split) // count)
        texts = [t.decode() for t in record["texts"]]
        clips.append(
            {
                "video_id": record["video_id"].decode(),
                "frames": [records.decode_jpeg(f) for f in record["frames"]],
                "texts": texts,
                "answers": [a.decode() for a in record["answers"]],
                **{k: record[k] for k in ("boxes", "classes", "scores")},
            }
        )
        shown = texts[: contact_sheet.TEXTS]
        nouns.append([p.nouns for p in text.parse_many(shown, tokenizer, tagger)])
    contact_sheet.draw(clips, split.class_names, nouns, path)
