"""Compare the authors' code with ours on the same random weights and batch, in float32.

    STOA_VLP_REFERENCE=/path/to/STOA-VLP python -m benchmarks.parity_released [--small]

The directory is a checkout of the authors' repository; none of it is part of ours. Their code runs
unmodified, except that half precision, process groups, and packages for data loading and downloads
are replaced, so that it runs on a CPU. `--small` uses a narrow model, and `--golden FILE` stores a
sample of the authors' numbers for `tests/released_test.py`. See docs/weights.md.
"""

import argparse
import json
import os
import random
import sys
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
import released_example as example  # noqa: E402

from stoa_jax.models.clip import MEAN, STD  # noqa: E402
from stoa_jax.weights import released  # noqa: E402
from stoa_jax.weights.tables import write_table  # noqa: E402


def roi_align(features, boxes, size, scale, sampling, aligned):
    """Compute torchvision's RoIAlign from its definition, with one sample in each bin's middle."""
    assert sampling == -1 and aligned
    _, _, height, width = features.shape
    out = []
    for image, of_image in zip(features, boxes, strict=True):
        for box in of_image:
            x1, y1, x2, y2 = (box * scale - 0.5).tolist()
            # Adaptive sampling: as many samples as patches in a bin, here one or none.
            samples = np.ceil((y2 - y1) / size[0]), np.ceil((x2 - x1) / size[1])
            if 0 in samples:
                out.append(torch.zeros(image.shape[0], *size))
                continue
            assert samples == (1, 1), samples
            ys = y1 + (torch.arange(size[0]) + 0.5) * (y2 - y1) / size[0]
            xs = x1 + (torch.arange(size[1]) + 0.5) * (x2 - x1) / size[1]
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
            y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
            y0, x0 = y.floor().long(), x.floor().long()
            y9, x9 = (y0 + 1).clamp(max=height - 1), (x0 + 1).clamp(max=width - 1)
            fy, fx = y - y0, x - x0
            value = (
                image[:, y0, x0] * (1 - fy) * (1 - fx)
                + image[:, y0, x9] * (1 - fy) * fx
                + image[:, y9, x0] * fy * (1 - fx)
                + image[:, y9, x9] * fy * fx
            )
            out.append(value * inside)
    return torch.stack(out)


def load_reference(folder: Path):
    """Import the authors' pre-training module, patched to run on a CPU in float32."""
    for name in ("torchvision", "torchvision.ops", "boto3", "botocore", "botocore.exceptions"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchvision.ops"].roi_align = roi_align
    sys.modules["botocore.exceptions"].ClientError = Exception
    sys.path.insert(0, str(folder))
    from modules import modeling_pretrain

    torch.Tensor.half = torch.Tensor.float
    torch.distributed.barrier = lambda *_, **__: None
    modeling_pretrain.allgather = lambda x, _: x
    modeling_pretrain.convert_weights = lambda model: None
    return modeling_pretrain


def reference_numbers(theirs, c, params, data) -> dict[str, np.ndarray]:
    """Run the authors' forward pass, and return its outputs and intermediate values."""
    state = {k: torch.from_numpy(v.copy()) for k, v in write_table(released.TABLE, params).items()}
    task = types.SimpleNamespace(
        max_words=c.text_length, max_frames=c.frames, object_count=c.objects_per_frame,
        loose_type=True, linear_patch="2d", sim_header="meanP", mask_ratio=0.15, local_rank=0,
        rank=0, world_size=1, cross_num_hidden_layers=4,
    )  # fmt: skip
    cross = theirs.CrossConfig(32, hidden_size=512, max_position_embeddings=128)
    clip_part = {k.removeprefix("clip."): v for k, v in state.items() if k.startswith("clip.")}
    model = theirs.CLIP4Clip(cross, clip_part, task)
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    unread = [n for n in found.missing_keys if not any(_fits(p, n) for p, _ in released.UNUSED)]
    assert not unread, unread
    model.eval()

    b, t, k = data["classes"].shape
    length = c.text_length
    drawn = example.chances(data)
    pixels = (data["pixels"] / 255.0 - np.array(MEAN)) / np.array(STD)
    video = torch.from_numpy(pixels.transpose(0, 1, 4, 2, 3).astype(np.float32))
    tokens = torch.from_numpy(data["tokens"]).long()
    count = (data["tokens"] == c.vocab_size - 1).argmax(-1) + 1
    mask = np.arange(length) < count[:, None]
    attention = torch.from_numpy(mask).long()[:, None]
    valid = data["classes"] >= 0
    boxes = np.where(valid[..., None], data["boxes"] * 224, -1).astype(np.float32)
    ids = np.zeros((b, 2 * k), np.int64)
    for i in range(b):
        met = list(dict.fromkeys(data["classes"][i][valid[i]].tolist()))[: 2 * k]
        ids[i, : len(met)] = met
    labels = np.concatenate([np.ones((b, t + 1), np.int64), mask.astype(np.int64)], 1)
    labels[:, t + 1 :][drawn["masked"]] = -1

    kept: dict[str, list] = {"entropy": [], "mse": []}

    def keep(name, function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            kept.setdefault(name, []).append(out)
            return out

        return call

    entropy = model.CrossEntropyLoss

    def keep_scores(scores, target):
        kept["entropy"].append(scores)
        return entropy(scores, target)

    del model.CrossEntropyLoss
    object.__setattr__(model, "CrossEntropyLoss", keep_scores)
    object.__setattr__(model, "get_act_output", keep("actions", model.get_act_output))
    object.__setattr__(model, "get_visual_output", keep("visual", model.get_visual_output))
    object.__setattr__(model, "get_sequence_output", keep("sequence", model.get_sequence_output))
    model.clip.object_fusion.ln_post.register_forward_hook(
        lambda _, args, out: kept.setdefault("trajectories", []).append(out)
    )
    negatives = iter((drawn["wrong_video"], drawn["wrong_text"]))
    tag = data["tags"]
    with (
        torch.no_grad(),
        mock.patch.object(random, "randint", lambda low, high: low),
        mock.patch.object(
            torch, "multinomial", lambda *_, **__: torch.from_numpy(next(negatives))[:, None]
        ),
    ):
        vtm, mlm, plm, alignment, vtc = model(
            tokens[:, None],
            torch.zeros_like(tokens)[:, None],
            attention,
            video[:, None, :, None],
            torch.ones(b, 1, t, dtype=torch.long),
            fusion_labels=torch.from_numpy(labels),
            objects=torch.from_numpy(boxes),
            object_layer=[11],
            object_fuse="fusion",
            obj_cls_tuple=(
                torch.from_numpy(np.where(valid, data["classes"], 0)).long(),
                torch.from_numpy(ids),
                None,
                None,
            ),
            pos_tag=(
                torch.from_numpy((tag == example.objectives.VERB).astype(np.int64)),
                torch.from_numpy((tag == example.objectives.NOUN).astype(np.int64)),
            ),
            use_action=True,
        )
    frames, (objects, _, _) = kept["visual"][0]
    when = model.clip.object_frame_pos_emb.detach().repeat(b, 1)[:, None]  # [B·T, 1, h]
    objects = (objects.permute(1, 0, 2) + when).reshape(b, t, k, -1)
    trajectories = kept["trajectories"][0] @ model.clip.object_fusion.proj.detach()
    mlm_logits, plm_logits, match = kept["entropy"]
    match = match.reshape(b, 3, 2).permute(1, 0, 2)
    return {
        "frames": frames.numpy(),
        "text": kept["sequence"][-1][1].numpy(),
        "objects": objects.numpy()[valid],
        "trajectories": trajectories.numpy()[ids != 0],
        "actions": kept["actions"][0].numpy(),
        "mlm_logits": mlm_logits.numpy(),
        "plm_logits": plm_logits.numpy(),
        "match_scores": match.numpy(),
        "losses": {
            name: float(x)
            for name, x in dict(vtm=vtm, mlm=mlm, plm=plm, alignment=alignment, vtc=vtc).items()
        },
    }


def _fits(pattern: str, name: str) -> bool:
    import re

    return re.fullmatch(pattern, name) is not None


def main() -> None:
    """Run both and print the largest differences; exit with 1 if one is above 1e-4."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="use a narrow model; takes a minute")
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--golden", type=Path, help="store a sample of the authors' numbers")
    args = parser.parse_args()
    folder = os.environ.get("STOA_VLP_REFERENCE")
    if not folder:
        sys.exit("error: set STOA_VLP_REFERENCE to a checkout of the authors' code")
    c = example.SMALL if args.small else example.FULL
    params, data = example.parameters(c), example.batch(c, args.clips)
    start = time.time()
    theirs = reference_numbers(load_reference(Path(folder)), c, params, data)
    print(f"theirs: {time.time() - start:.0f} s", flush=True)
    if args.golden:
        args.golden.write_text(json.dumps(example.sample(theirs), indent=1))
    start = time.time()
    patch = types.SimpleNamespace(setattr=setattr)
    ours = example.numbers(example.model(c, params), data, patch)
    print(f"ours: {time.time() - start:.0f} s; largest absolute difference, largest value")
    worst = 0.0
    ours |= {f"loss {name}": x for name, x in ours.pop("losses").items()}
    for name, value in theirs["losses"].items():
        theirs[f"loss {name}"] = value
    for name, x in ours.items():
        there = np.asarray(theirs[name])
        assert np.shape(x) == there.shape, (name, np.shape(x), there.shape)
        difference = float(np.abs(x - there).max())
        worst = max(worst, difference)
        print(f"{name:14} {there.shape!s:16} {difference:.2e} {np.abs(there).max():9.4f}")
    print("within 1e-4" if worst <= 1e-4 else f"NOT within 1e-4: {worst:.2e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
