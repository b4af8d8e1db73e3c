"""Write a CLIP as a Hugging Face `CLIPModel` directory."""

import json
import shutil
from pathlib import Path

import numpy as np

from stoa_jax.files import atomic_directory
from stoa_jax.models.config import ModelConfig
from stoa_jax.weights import clip, files
from stoa_jax.weights.tables import write_table

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)


def save_hugging_face(
    out: Path, params: dict[str, np.ndarray], c: ModelConfig, *, beside: Path | None = None
) -> None:
    """Write the towers as a `CLIPModel` directory, with the tokenizer files found in `beside`."""
    towers = {n: x for n, x in params.items() if n.startswith(("visual/", "text/", "logit_scale"))}
    towers.pop("text/mask_embedding", None)
    common = dict(hidden_act=c.activation, projection_dim=c.text_width)
    note = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": c.text_width,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": c.vocab_size,
            "hidden_size": c.text_width,
            "intermediate_size": 4 * c.text_width,
            "num_hidden_layers": c.text_depth,
            "num_attention_heads": c.text_heads,
            "max_position_embeddings": len(params["text/positions"]),
            "bos_token_id": c.vocab_size - 2,
            "eos_token_id": c.vocab_size - 1,
            **common,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": c.vision_width,
            "intermediate_size": 4 * c.vision_width,
            "num_hidden_layers": c.vision_depth,
            "num_attention_heads": c.vision_heads,
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            **common,
        },
    }
    with atomic_directory(out) as folder:
        tensors = write_table(clip.HUGGING_FACE, towers)
        files.save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(note, indent=1))
        for name in _TOKENIZER_FILES:
            if beside is not None and (beside / name).is_file():
                shutil.copy(beside / name, folder / name)
