"""Index a folder of synthetic clips and videos of your own in two shards, and search it.

    python -m benchmarks.folder OUT --clips=300 --videos=DIR

Writes OUT/videos, OUT/detections.jsonl and OUT/index with the `stoa` command line and the shipped
model, and times every step; OUT must not exist. One of the files is not a video, to show how it is
reported. Then it measures retrieval and the index-wide threshold: half of the sentences that no
indexed clip answers set the threshold, and the other half test it. A clip answers a sentence if all
events of the sentence happen in it. A hard sentence is about objects that indexed clips show, but
that do something else there.

To see the page, run `stoa serve --index=OUT/index --detections=OUT/detections.jsonl`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import stoa_jax
from stoa_jax.data.synthetic import World
from stoa_jax.data.synthetic.scene import Scene
from stoa_jax.serve import example_library as library

MODEL, RATE = "synthetic", 0.05


def stoa(*arguments: object, code: int = 0) -> str:
    """Run `stoa`, print its time and the end of its output, and return its standard output."""
    command = [str(argument) for argument in arguments]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "stoa_jax.cli", *command], capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    said = " | ".join((done.stdout + done.stderr).strip().splitlines()[-4:])
    print(f"stoa {' '.join(command)}  [{seconds:.1f} s]\n    {said[:400]}", flush=True)
    if done.returncode != code:
        sys.exit(f"exit code {done.returncode} instead of {code}:\n{done.stderr[-2000:]}")
    return done.stdout


def things(scene: Scene) -> list[str]:
    """Return the objects of a scene, each as its colour and shape."""
    return [f"{thing.colour} {thing.shape}" for thing in scene.things]


def events(scene: Scene) -> set[tuple[str, str, str]]:
    """Return the events of a scene as (motion, subject, other object or "")."""
    names = things(scene)
    return {
        (e.motion, names[e.subject], "" if e.other is None else names[e.other])
        for e in scene.events
    }


def unanswered(world: World, indexed: list[Scene], count: int) -> dict[str, list[str]]:
    """Return sentences that no indexed scene answers, `count` easy and `count` hard ones."""
    happens = [events(scene) for scene in indexed]
    shown = {name for scene in indexed for name in things(scene)}
    found: dict[str, list[str]] = {"easy": [], "hard": []}
    at = len(indexed)
    while min(map(len, found.values())) < count:
        scene, at = world.scene(at), at + 1
        wanted = events(scene)
        if any(wanted <= one for one in happens):
            continue
        kind = "hard" if {subject for _, subject, _ in wanted} <= shown else "easy"
        if len(found[kind]) < count:
            found[kind].append(caption(world, at - 1))
    return found


def caption(world: World, i: int) -> str:
    """Return the shortest caption of a clip; every caption describes all events."""
    return min(world.clip(i).captions, key=len)


def accepted(index: stoa_jax.Index, texts: list[str]) -> float:
    """Return the share of texts for which a search finds a match."""
    return float(np.mean([any(hit.matched for hit in index.search(text)) for text in texts]))


def build(out: Path, clips: int, videos: Path | None) -> None:
    """Write the videos and index them in two shards."""
    started = time.perf_counter()
    out.mkdir(parents=True)
    library.generate(out, clips)
    print(f"{clips} clips written in {time.perf_counter() - started:.1f} s")
    for path in sorted(videos.iterdir()) if videos else ():
        shutil.copy(path, out / "videos")
    (out / "videos" / "broken.mp4").write_bytes(b"no video")
    parts = [out / "part0", out / "part1"]
    for shard, part in enumerate(parts):
        stoa("index", "create", part, f"--model={MODEL}", "--fusion")
        where = ("index", "add", part, out / "videos", f"--detections={out / 'detections.jsonl'}")
        broken = sorted(os.listdir(out / "videos")).index("broken.mp4") % 2 == shard
        stoa(*where, f"--shard={shard}/2", code=int(broken))
        stoa(*where, f"--shard={shard}/2", code=int(broken))  # skips what is already indexed
        failures = part / "failures.jsonl"
        print(f"    failures: {failures.read_text().strip() if failures.exists() else 'none'}")
    stoa("index", "merge", out / "index", *parts)
    last = sorted((out / "videos").glob("*.mp4"))[-1]
    stoa("index", "search", out / "index", "a red star is rising", "-k", 2)
    stoa("index", "search", out / "index", last, "--video", "-k", 2)
    stoa("index", "delete", out / "index", last)
    stoa("index", "compact", out / "index")
    stoa("index", "add", out / "index", last, f"--detections={out / 'detections.jsonl'}")
    stoa("index", "info", out / "index")


def measure(out: Path, clips: int, queries: int) -> None:
    """Measure retrieval, the threshold, and the time of a search."""
    world = World("test", size=library.SIZE, frames=library.FRAMES, max_objects=library.OBJECTS)
    index = stoa_jax.Index.open(out / "index", stoa_jax.load(MODEL))
    asked = list(range(0, clips, max(1, clips // queries)))
    texts = [caption(world, i) for i in asked]
    names = [f"{world.clip(i).video_id}.mp4" for i in asked]
    for name, rerank in (("vectors alone", False), ("re-ranked", 50)):
        index.search(texts[0], rerank=rerank)
        started = time.perf_counter()
        hits = [index.search(text, rerank=rerank) for text in texts]
        seconds = (time.perf_counter() - started) / len(texts)
        first = [name == Path(found[0].video).name for name, found in zip(names, hits, strict=True)]
        print(
            f"{len(texts)} captions, {name}: R@1 {100 * np.mean(first):.1f} %, "
            f"{1000 * seconds:.0f} ms a query"
        )
    sentences = unanswered(world, [world.scene(i) for i in range(clips)], 2 * queries)
    print(f"threshold for one pair: {stoa_jax.load(MODEL).threshold:.3f}")
    print(
        f"  answered {100 * accepted(index, texts):.1f} %, "
        + ", ".join(
            f"{k} unanswered {100 * accepted(index, v):.1f} %" for k, v in sentences.items()
        )
    )
    for kinds in (["easy"], ["hard"], ["easy", "hard"]):
        half = [text for kind in kinds for text in sentences[kind][:queries]]
        (out / "unanswerable.txt").write_text("\n".join(half) + "\n")
        threshold = index.calibrate(half, rate=RATE)
        print(
            f"threshold by {len(half)} {' and '.join(kinds)} sentences at a rate of {RATE}: "
            f"{threshold:.4f}"
        )
        print(
            f"  answered {100 * accepted(index, texts):.1f} %, "
            + ", ".join(
                f"{k} unanswered {100 * accepted(index, v[queries:]):.1f} %"
                for k, v in sentences.items()
            )
        )
    index.close()
    stoa("index", "calibrate", out / "index", out / "unanswerable.txt", f"--rate={RATE}")
    stoa("index", "search", out / "index", sentences["easy"][-1], "-k", 2)


def main() -> None:
    """Build the index and measure it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--videos", type=Path, help="folder of other videos to add")
    parser.add_argument("--queries", type=int, default=100)
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists; name a new directory")
    build(args.out, args.clips, args.videos)
    measure(args.out, args.clips, args.queries)


if __name__ == "__main__":
    main()
