"""Train a small CLIP (the two towers alone), if you have no pre-trained one.

    python -m stoa_jax.main --config=configs/clip.py:synthetic --workdir=runs/clip
    python -m stoa_jax.convert runs/clip runs/clip-hf --to=hugging_face
    python -m stoa_jax.main --config=configs/pretrain.py:synthetic --workdir=runs/pretrain \
        --config.init.path=runs/clip-hf

Sets: synthetic (built), live (rendered in memory, for configs/joint.py). If you have real clips,
start from a real CLIP checkpoint instead.

On two CPU cores: of 1,000 pictures of one object, the nearest of 90 texts names the right shape for
79 % (10 shapes) and the right colour for 69 % (9 colours) after 300 steps. All 400 steps of
`synthetic` take 1.4 minutes and 1.1 GiB (Intel Xeon, `python -m benchmarks.configs`); 90.8 % of 120
validation texts then find their picture among 40. live: see the card of the shipped checkpoint,
stoa_jax/checkpoints/synthetic/README.md.
"""

from stoa_jax import config
from stoa_jax.errors import UserError


def get_config(dataset: str = "synthetic"):
    if dataset == "live":
        return live()
    if dataset != "synthetic":
        raise UserError(
            f"configs/clip.py:{dataset}: the sets are synthetic and live; for others start from a "
            "real CLIP"
        )
    c = config.small("pretrain")
    c.model.objects = c.model.actions = False
    config.set_losses(c, vtc=1.0)
    c.model.frames = 1  # pictures, which CLIP was trained on
    c.data.sets = (("synthetic/pictures", 1.0),)
    c.train.batch_size = 128
    c.train.steps = 400
    c.optim.groups = ((r".*", 1e-3),)
    c.checkpoint.every_steps = 150
    return c


def live():
    """Return the shipped checkpoint's CLIP: the variant `small`, on pictures rendered in memory."""
    c = get_config("synthetic")
    small = config.model_section("small")
    c.model.update({name: small[name] for name in ("text_width", "text_heads", "fusion_heads")})
    c.data.live = True
    c.data.world.update(dict(size=c.model.image_size, siblings=1, max_objects=3))
    c.data.world.update(dict(train=30000, validation=200, test=500))
    c.data.crop = "center"
    c.train.steps = 5000
    c.checkpoint.every_steps = 500
    c.log.tensorboard = False
    return c
