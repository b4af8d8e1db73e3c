"""Fine-tuning and evaluating multiple choice: which of five captions belongs to the clip?

    python -m stoa_jax.main --config=configs/multiple_choice.py:msrvtt --workdir=runs/choice \
        --config.init.path=runs/pretrain

Zero-shot from retrieval: --mode=eval --config.init.path=runs/retrieval and an empty --workdir.
Sets: synthetic, msrvtt (trained on the captions of the 7k list, as it has no training choices; the
9k list holds 1,990 of the 2,990 test videos).
"""

from stoa_jax import config
from stoa_jax.errors import UserError

SETS = ("synthetic", "msrvtt")


def get_config(dataset: str = "synthetic"):
    if dataset not in SETS:
        raise UserError(f"configs/multiple_choice.py:{dataset}: the sets are {', '.join(SETS)}")
    if dataset == "synthetic":
        c = config.finetuning("multiple_choice", "tiny")
        c.data.sets = (("synthetic/multiple_choice", 1.0),)
        return c
    c = config.finetuning("multiple_choice", "base")
    c.data.sets = (("msrvtt/retrieval", 1.0),)
    c.data.train_split = "train_7k"
    c.data.eval_set = "msrvtt/multiple_choice"
    c.data.eval_split = "test"
    return c
