"""The library on a CLIP directory, against transformers' own model and image processor."""

import numpy as np
import pytest
from clip_tiny import FOLDER
from videos import write

import stoa_jax
from stoa_jax.data import video

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("size", [(96, 64), (48, 90)])
def test_vectors_of_a_file_are_those_of_transformers(tmp_path, size):
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel

    path = write(tmp_path / "a.mp4", size=size)
    model = stoa_jax.load(FOLDER, frames=5)
    frames, _ = video.read_frames(path, 5)
    side = model.config.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    theirs = CLIPModel.from_pretrained(FOLDER, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        features = theirs.get_image_features(pixels)
    features = getattr(features, "pooler_output", features)
    features = torch.nn.functional.normalize(features, dim=-1).mean(0)
    wanted = torch.nn.functional.normalize(features, dim=0).numpy()
    np.testing.assert_allclose(model.encode_video([path])[0], wanted, atol=1e-4)
