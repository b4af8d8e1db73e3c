"""Create `tests/data/clip_tiny`: a random transformers CLIP in float16, and its outputs.

python tests/support/clip_tiny.py
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "data" / "clip_tiny"
TEXTS = ((5, 6, 7), (900, 1, 2, 3, 4, 5, 6), ())


def pixels() -> np.ndarray:
    """Return three frames of 16×16."""
    return np.random.RandomState(0).randint(0, 256, (3, 16, 16, 3)).astype(np.uint8)


def tokens(vocab_size: int = 1024, length: int = 12) -> np.ndarray:
    """Return the texts, between start and end."""
    ids = np.zeros((len(TEXTS), length), np.int32)
    for row, words in zip(ids, TEXTS, strict=True):
        row[: len(words) + 2] = [vocab_size - 2, *words, vocab_size - 1]
    return ids


def main() -> None:
    """Sample weights, round them to float16, and run transformers' model on them in float32."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from stoa_jax.models.clip import MEAN, STD

    torch.manual_seed(0)
    common = dict(
        hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=24, hidden_act="quick_gelu",
    )  # fmt: skip
    config = CLIPConfig(
        projection_dim=24,
        text_config=dict(
            vocab_size=1024,
            max_position_embeddings=16,
            bos_token_id=1022,
            eos_token_id=1023,
            **common,
        ),
        vision_config=dict(image_size=16, patch_size=4, **common),
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.02 * torch.randn(p.shape)).half().float())
        x = (pixels() / 255.0 - np.array(MEAN)) / np.array(STD)
        x = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))
        image = model.vision_model(x, output_hidden_states=True)
        text = model.text_model(torch.from_numpy(tokens()).long())
        found = {
            "image": model.visual_projection(image.pooler_output).tolist(),
            "layer": image.hidden_states[1][0].tolist(),
            "text": model.text_projection(text.pooler_output).tolist(),
        }
    FOLDER.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(FOLDER)
    (FOLDER / "features.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
