"""Export the inference functions as compiled programs that need none of our code: `jax.export`.

An export is a directory: `encode_video.bin` and `encode_text.bin`, each for cpu, cuda and tpu and
for any number of clips or texts; `weights.npz`, the first argument of both; `export.json`. With
jax and numpy alone:

    params = dict(np.load("OUT/weights.npz"))
    encode = jax.export.deserialize(open("OUT/encode_video.bin", "rb").read())
    vectors = encode.call(params, clips)     # uint8 [b, T, S, S, 3] -> float32 [b, d]
"""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from stoa_jax import migrations
from stoa_jax.errors import UserError
from stoa_jax.inference import fingerprints
from stoa_jax.inference.model import Model
from stoa_jax.inference.programs import Towers, frame_tokens, text_embedding, video_embedding
from stoa_jax.inference.tokenizers import tokenizer_for
from stoa_jax.models.config import ModelConfig
from stoa_jax.models.parameters import named_parameters, with_parameters
from stoa_jax.models.stoa import Stoa

PLATFORMS = ("cpu", "cuda", "tpu")
_NOTE = "stoa_jax export"
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")


def save_export(
    model: Towers | Stoa, out: str | Path, *, tokenizer_dir: Path | None = None
) -> None:
    """Write the export of a model's two towers to a new directory, atomically."""
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: already exists; name a new directory")
    c: ModelConfig = model.visual.config
    towers = named_parameters({"visual": model.visual, "text": model.text})
    # One program holds all platforms, and cuDNN's attention lowers for one only.
    like = {"visual": model.visual.portable(), "text": model.text}

    def bind(params) -> Any:
        return _Bound(**with_parameters(like, params))

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in towers.items()}
    side, length = c.image_size, c.text_length
    if c.joint_blocks:
        (b,) = jax.export.symbolic_shape("b")
        t = c.frames
    else:
        b, t = jax.export.symbolic_shape("b, t")
    clips = jax.ShapeDtypeStruct((b, t, side, side, 3), jnp.uint8)
    (n,) = jax.export.symbolic_shape("b")
    texts = jax.ShapeDtypeStruct((n, length), jnp.int32)
    programs = {
        "encode_video": (lambda params, x: video_embedding(bind(params), x), clips),
        "encode_frames": (lambda params, x: frame_tokens(bind(params), x), clips),
        "encode_text": (lambda params, x: text_embedding(bind(params), x), texts),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".partial"))
    try:
        for name, (function, x) in programs.items():
            exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(shapes, x)
            (folder / f"{name}.bin").write_bytes(exported.serialize())
        arrays: dict[str, Any] = {k: np.asarray(x) for k, x in towers.items()}
        np.savez(folder / "weights.npz", **arrays)
        for name in _TOKENIZER:
            if tokenizer_dir is not None and (tokenizer_dir / name).is_file():
                shutil.copy(tokenizer_dir / name, folder / name)
        note = {
            "format": _NOTE,
            "version": 1,
            "platforms": PLATFORMS,
            "encode_video": f"params, uint8 [b, {t}, {side}, {side}, 3] -> float32 [b, d]",
            "encode_text": f"params, int32 [b, {length}] CLIP ids -> float32 [b, d]",
            "model": dataclasses.asdict(c),
            "weights_hash": fingerprints.of_weights(model),
        }
        (folder / "export.json").write_text(json.dumps(note, indent=1))
        folder.chmod(0o755)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass
class _Bound:
    """The two towers, under the names that the functions of `inference` use."""

    visual: object
    text: object


def is_export(path: str | Path) -> bool:
    """Return whether `save_export` wrote this directory."""
    note = Path(path) / "export.json"
    return note.is_file() and _NOTE in note.read_text(errors="replace")


def load_export(path: str | Path, *, frames: int | None = None, truncate: bool = False) -> Model:
    """Open an export as a model; it runs the exported programs and none of our modules."""
    path = Path(path)
    try:
        note = json.loads((path / "export.json").read_text())
        c = ModelConfig(**migrations.migrate_model_fields(note["model"]))
        # The names are those in the programs, so they are not migrated.
        with np.load(path / "weights.npz", allow_pickle=False) as archive:
            params = {name: jnp.asarray(archive[name]) for name in archive.files}
        programs = {
            name: jax.export.deserialize(bytearray((path / f"{name}.bin").read_bytes()))
            for name in ("encode_frames", "encode_text")
        }
    except Exception as error:  # flatbuffers, zip and JSON have different exceptions
        line = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        raise UserError(f"{path}: damaged export ({line}); export the model again") from error
    calls = {name: jax.jit(program.call) for name, program in programs.items()}
    return Model(
        c,
        "export",
        tokenizer_for(path, c),
        frames=frames or c.frames,
        truncate=truncate,
        source=path,
        weights_hash=note.get("weights_hash") or fingerprints.of_arrays(params),
        encode_frames=lambda x: calls["encode_frames"](params, x),
        encode_tokens=lambda x: calls["encode_text"](params, x),
    )
