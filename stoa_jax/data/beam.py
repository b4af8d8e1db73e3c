"""Build a data set with Apache Beam; each shard is one element.

    python -m stoa_jax.data.beam DATASET --manual-dir=DIR --data-dir=OUT [--detections=PATH]
        [any flag of stoa_jax.data.build] -- --runner=FlinkRunner ...

Arguments after `--` go to Beam; without them the DirectRunner runs on this machine. All workers
must see DIR and OUT under these names, on a shared file system. Bytes, shards and resuming are
those of `stoa_jax.data.build`: each can continue what the other began.

Needs the extra `beam`, best in its own environment: Beam downgrades protobuf to version 6.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from stoa_jax.data.build import __main__ as command_line
from stoa_jax.data.build import run as building
from stoa_jax.data.build import shards, workers
from stoa_jax.errors import UserError


def run(
    job: workers.Job,
    parts: Sequence[shards.Part],
    directory: Path,
    *,
    options: Sequence[str] = (),
    timeout: float = building.CLIP_SECONDS,
) -> None:
    """Build the missing shards in a Beam pipeline; this is a `run` of `build.run.build_source`."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "Apache Beam is not installed: pip install 'stoa-jax[beam]', in its own environment"
        ) from None

    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = (
            pipeline
            | "Shards" >> beam.Create(parts)
            | "Spread" >> beam.Reshuffle()
            | "Build" >> beam.Map(functools.partial(_build_part, job, directory, timeout))
        )


def _build_part(job: workers.Job, directory: Path, timeout: float, part: shards.Part) -> str:
    # Encode in a separate process: a clip can crash it, and Beam would retry the whole shard.
    building.encode_parts(job, [part], directory, processes=1, timeout=timeout)
    return part.shard.name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    ours, options = argv, []
    if "--" in argv:
        ours, options = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    return command_line.main(ours, run=functools.partial(run, options=options))


if __name__ == "__main__":
    sys.exit(main())
