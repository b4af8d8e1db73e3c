"""Detect objects in the frames that the build samples, with a Hugging Face detection model.

    python -m stoa_jax.data.detect --videos=DIR --model=HF_DIR --out=detections.jsonl

Writes one JSON line per frame; `--detections` of the build and of inference reads them. Run the
same command again after a stop: finished videos stay, and a torn last line is cut off. Unreadable
videos are listed in OUT.failures.jsonl. To share the work among eight processes, give them
--share=1/8 to --share=8/8 and an --out each, and join the files with `cat`.

Needs PyTorch and transformers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from stoa_jax import command_line
from stoa_jax.data.detections import detector
from stoa_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m stoa_jax.data.detect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--videos", required=True, type=Path, help="a directory, or one video")
    add("--model", required=True, help="a directory with the model, or its name on the hub")
    add("--out", required=True, type=Path, help="the JSON lines to write")
    add("--frames", type=int, default=12, help="frames per video, as in the build (%(default)s)")
    add("--short-side", type=int, default=480, help="of the model's input, pixels (%(default)s)")
    add("--threshold", type=float, default=0.2, help="lowest score of an object (%(default)s)")
    add("--most", type=int, default=30, help="objects kept per frame (%(default)s)")
    add("--batch-size", type=int, default=12, help="frames per batch (%(default)s)")
    add("--device", default="", help="cpu or cuda (default: cuda if there is one)")
    add("--share", default="1/1", help="I/N: this is process I of N (%(default)s)")
    known = parser.parse_args(argv)
    return command_line.run(
        lambda: _run(known), stopped="stopped; run the same command again to continue"
    )


def _run(known: argparse.Namespace) -> int:
    if not known.videos.exists():
        raise UserError(f"--videos={known.videos}: no such file or directory")
    videos = detector.share_of(list(detector.find_videos(known.videos)), known.share)
    model = detector.load_detector(known.model, known.threshold, known.device, known.batch_size)
    good, bad = detector.detect_videos(
        videos,
        model,
        known.out,
        frames=known.frames,
        short_side=known.short_side,
        most=known.most,
    )
    kept = len(videos) - good - bad
    print(f"{known.out}: {good} videos done, {kept} already done, {bad} failed")
    return command_line.FAILED if bad and not good and not kept else command_line.DONE


if __name__ == "__main__":
    sys.exit(main())
