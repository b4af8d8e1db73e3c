"""Fine-tuning and evaluating text-video retrieval.

    python -m stoa_jax.main --config=configs/retrieval.py:msrvtt --workdir=runs/retrieval \
        --config.init.path=runs/pretrain

Zero-shot, with any weights, CLIP alone too: add --mode=eval and an empty --workdir.
Sets: synthetic, msrvtt (9k list, 1k-A test), msvd, lsmdc, didemo.
"""

from stoa_jax import config
from stoa_jax.errors import UserError

SETS = ("synthetic", "msrvtt", "msvd", "lsmdc", "didemo")


def get_config(dataset: str = "synthetic"):
    if dataset not in SETS:
        raise UserError(f"configs/retrieval.py:{dataset}: the sets are {', '.join(SETS)}")
    if dataset == "synthetic":
        c = config.finetuning("retrieval", "tiny")
        c.data.sets = (("synthetic/captions", 1.0),)
        return c
    c = config.finetuning("retrieval", "base")
    c.data.sets = ((f"{dataset}/retrieval", 1.0),)
    c.data.eval_split = "test"
    if dataset == "didemo":  # a paragraph: all descriptions of a video
        c.model.text_length = 64
    return c
