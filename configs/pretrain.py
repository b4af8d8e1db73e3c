"""Pre-training with all six losses.

    python -m stoa_jax.main --config=configs/pretrain.py:synthetic --workdir=runs/pretrain

Sets: synthetic (two CPU cores, minutes), webvid (a pod), folder (your own clips).
"""

from stoa_jax import config
from stoa_jax.errors import UserError


def get_config(dataset: str = "synthetic"):
    if dataset == "synthetic":
        return synthetic()
    if dataset not in ("webvid", "folder"):
        raise UserError(f"configs/pretrain.py:{dataset}: the sets are synthetic, webvid, folder")
    c = config.default("pretrain", "base")
    c.data.sets = ((f"{dataset}/captions", 1.0),)
    c.data.workers = 8
    c.model.dtype = "bfloat16"
    c.train.batch_size = 1024  # global, clips
    c.train.epochs = 10.0
    c.checkpoint.every_steps = 500
    c.eval.every_steps = 5000
    return c


def synthetic():
    """From the small CLIP of `configs/clip.py`, as the paper starts from the large one."""
    c = config.small("pretrain")
    # The first layers of a text tower that has seen captions for a minute are no start for fusion.
    c.init.anew = r"^fusion/blocks"
    c.loss.update(dict(vtc=1.0, vtm=1.0, mlm=0.3, plm=1.0, ota=0.5, asp=0.5))
    c.train.batch_size = 32
    c.train.steps = 400
    return c
