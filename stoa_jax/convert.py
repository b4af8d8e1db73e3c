"""Convert weights between formats: `python -m stoa_jax.convert SOURCE OUT --to=FORMAT`.

SOURCE is a Hugging Face CLIP directory, an OpenAI or open_clip file, the authors' STOA-VLP
checkpoint, a run's work directory, or our safetensors. If the conversion fails, OUT is not created.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from stoa_jax import command_line, weights
from stoa_jax.errors import UserError
from stoa_jax.files import atomic, atomic_directory
from stoa_jax.models.config import VARIANTS, ModelConfig
from stoa_jax.weights import clip, files, released
from stoa_jax.weights.hugging_face import save_hugging_face
from stoa_jax.weights.tables import Report, write_table
from stoa_jax.weights.torch_files import INSTALL_TORCH

FORMATS = {
    "safetensors": "one file in our names; from a CLIP, a STOA-VLP initialised from it",
    "orbax": "a work directory, for --config.init.path or for evaluation",
    "hugging_face": "a CLIPModel directory with the two towers; bit-identical both ways",
    "released": "the authors' names, as .pt or .bin (needs torch), or as .safetensors",
    "export": "jax.export programs for cpu, cuda and tpu, loadable without stoa_jax",
}


def parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    lines = "\n".join(f"  {name:13} {what}" for name, what in FORMATS.items())
    p = argparse.ArgumentParser(
        prog="python -m stoa_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"formats:\n{lines}\n\n"
        "examples:\n"
        "  python -m stoa_jax.convert ViT-B-16.pt clip-hf --to=hugging_face\n"
        "  python -m stoa_jax.convert stoa_vlp.bin stoa.safetensors --to=safetensors\n"
        "  python -m stoa_jax.convert runs/retrieval served --to=export\n\n"
        "A report lists what every tensor of SOURCE was used for, or why it is unused, and which\n"
        "parameters of the result are new. A file that does not fit is an error that names the\n"
        "file and the tensor, and nothing is written.",
    )
    p.add_argument("source", help="weights to read")
    p.add_argument("out", help="file or directory to create; must not exist")
    p.add_argument("--to", required=True, choices=FORMATS, help="format of OUT; see below")
    p.add_argument(
        "--variant",
        choices=VARIANTS,
        help="from a CLIP: size of the STOA-VLP to build (default: that of the CLIP)",
    )
    p.add_argument(
        "--preset",
        choices=("paper", "released"),
        default="paper",
        help="from a CLIP: which STOA-VLP to build (default: paper)",
    )
    p.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu"),
        help="for a CLIP file that does not state it; open_clip models without quickgelu in their "
        "name use gelu",
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="to safetensors: the type in the file; it is read as float32 (default: float32)",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed for new parameters")
    p.add_argument("--quiet", action="store_true", help="do not print the report")
    return p


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    variant: str | None = None,
    preset: str = "paper",
    activation: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
) -> Report:
    """Read `source`, write `out` in the format `to`, and return the report on every tensor."""
    source, out = Path(source), Path(out)
    if out.exists():
        raise UserError(f"{out}: already exists; name a new file or directory")
    c, kind = weights.config_of(source, activation=activation)
    is_clip = kind in ("hugging_face", "openai", "open_clip")
    if is_clip and to in ("hugging_face", "export"):
        from stoa_jax.inference.loading import clip_towers
        from stoa_jax.models.parameters import named_parameters

        c = clip.vision_and_text(c)
        towers, report = clip_towers(source, c)
        if to == "export":
            from stoa_jax.inference.export import save_export

            save_export(towers, out, tokenizer_dir=source if source.is_dir() else None)
            return report
        params = {name: np.asarray(x) for name, x in named_parameters(towers).items()}
        save_hugging_face(out, params, c, beside=source)
        return report
    if is_clip:
        if variant:
            c = dataclasses.replace(getattr(ModelConfig, variant)(), activation=c.activation)
        if preset == "released":
            c = c.released()
        params, report = weights.whole_parameters(source, c, seed=seed)
    else:
        params, report = weights.initial_parameters(source, c)
    if to == "safetensors":
        params = {
            name: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
            for name, x in params.items()
        }
        note = {weights.METADATA: json.dumps(dataclasses.asdict(c))}
        if is_clip:
            note[weights.UNTRAINED] = json.dumps(["answer", "caption", "match"])
        files.save_safetensors(out, params, note)
    elif to == "orbax":
        save_orbax(out, params, c)
    elif to == "hugging_face":
        save_hugging_face(out, params, c)
    elif to == "released":
        save_released(out, params, c)
    else:
        from stoa_jax.inference.export import save_export
        from stoa_jax.inference.loading import load

        network = load(source).network
        assert network is not None  # a CLIP returned above, and exports are not a source
        save_export(network, out)
    if to in ("safetensors", "orbax", "export"):
        _copy_sidecars(source, out, kind)
    return report


def _copy_sidecars(source: Path, out: Path, kind: str) -> None:
    """Write beside `out` the answers, the calibration and the record of the run of `source`."""
    from stoa_jax.inference import run_record, sidecars
    from stoa_jax.inference.loading import run_answers

    sidecars.copy(source, out)
    if answers := sidecars.read_answers(source) or run_answers(source, kind):
        sidecars.write(out, sidecars.ANSWERS, list(answers))
    if record := run_record.read(source):
        sidecars.write(out, sidecars.RUN, record)


def save_released(out: Path, params: dict[str, np.ndarray], c: ModelConfig) -> None:
    """Write a `released` model in the form that the authors' code loads."""
    known = {e.ours for e in released.TABLE}
    other = sorted(set(params) - known)
    if other or known - set(params):
        raise UserError(
            f"{out}: --to=released needs a model of the preset `released`; this one also has "
            f"{', '.join(other[:4]) or 'nothing'} and lacks "
            f"{', '.join(sorted(known - set(params))[:4]) or 'nothing'}"
        )
    tensors = write_table(released.TABLE, params)
    if out.suffix == ".safetensors":
        files.save_safetensors(out, tensors, {})
        return
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{out}: writing this format needs torch, which is not installed; {INSTALL_TORCH}, or "
            "name a file that ends in .safetensors"
        ) from error
    state = {name: torch.from_numpy(np.array(x)) for name, x in sorted(tensors.items())}
    with atomic(out) as temporary:
        torch.save({"model_state_dict": state}, temporary)


def save_orbax(out: Path, params: dict[str, np.ndarray], c: ModelConfig) -> None:
    """Write a work directory with one checkpoint, at step 0 and without optimizer state."""
    import orbax.checkpoint as ocp
    from flax.traverse_util import unflatten_dict

    from stoa_jax import checkpoint

    meta = {"step": 0, "model": dataclasses.asdict(c), "checksums": checkpoint.checksums(params)}
    with (
        atomic_directory(out) as folder,
        ocp.CheckpointManager((folder / checkpoint.FOLDER).absolute()) as manager,
    ):
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(unflatten_dict(params, sep="/")),
                meta=ocp.args.JsonSave(meta),
            ),
        )
        manager.wait_until_finished()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = parser().parse_args(argv)

    def run() -> int:
        report = convert(
            args.source,
            args.out,
            args.to,
            variant=args.variant,
            preset=args.preset,
            activation=args.activation,
            seed=args.seed,
            dtype=args.dtype,
        )
        if not args.quiet:
            print(report)
        print(f"wrote {args.out}")
        return command_line.DONE

    return command_line.run(run)


if __name__ == "__main__":
    sys.exit(main())
