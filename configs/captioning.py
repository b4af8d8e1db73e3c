"""Fine-tuning and evaluating captioning.

    python -m stoa_jax.main --config=configs/captioning.py:msrvtt --workdir=runs/captioning \
        --config.init.path=runs/pretrain

Sets: synthetic, msrvtt (6513/497/2990), msvd (1200/100/670).
"""

from stoa_jax import config
from stoa_jax.errors import UserError

SETS = ("synthetic", "msrvtt", "msvd")


def get_config(dataset: str = "synthetic"):
    if dataset not in SETS:
        raise UserError(f"configs/captioning.py:{dataset}: the sets are {', '.join(SETS)}")
    if dataset == "synthetic":
        c = config.finetuning("captioning", "tiny")
        c.data.sets = (("synthetic/captions", 1.0),)
        return c
    c = config.finetuning("captioning", "base")
    c.data.sets = ((f"{dataset}/captioning", 1.0),)
    c.data.eval_split = "test"
    return c
