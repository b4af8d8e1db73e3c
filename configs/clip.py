"""The two towers alone, by contrast: a small CLIP, where no pre-trained one can be had.

    python -m stoa_jax.main --config=configs/clip.py:synthetic --workdir=runs/clip
    python -m stoa_jax.convert runs/clip runs/clip-hf --to=hugging_face
    python -m stoa_jax.main --config=configs/pretrain.py:synthetic --workdir=runs/pretrain \
        --config.init.path=runs/clip-hf

Set: synthetic. Who has real clips starts from a real CLIP.
"""

from stoa_jax import config
from stoa_jax.errors import UserError


def get_config(dataset: str = "synthetic"):
    if dataset != "synthetic":
        raise UserError(
            f"configs/clip.py:{dataset}: the sets are synthetic; a real CLIP serves others"
        )
    c = config.small("pretrain")
    c.model.objects = c.model.actions = False
    c.loss.update(dict(vtc=1.0, vtm=0.0, mlm=0.0, plm=0.0, ota=0.0, asp=0.0))
    c.model.frames = 1  # pictures, as CLIP was trained on
    c.data.sets = (("synthetic/pictures", 1.0),)
    c.train.batch_size = 128
    c.train.steps = 400
    c.optim.groups = ((r".*", 1e-3),)
    c.checkpoint.every_steps = 150
    return c
