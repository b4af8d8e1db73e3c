"""Fine-tuning and evaluating question answering.

    python -m stoa_jax.main --config=configs/qa.py:msvd --workdir=runs/qa \
        --config.init.path=runs/pretrain

Sets: synthetic, msrvtt (1500 answers), msvd (2423 answers).
"""

from stoa_jax import config
from stoa_jax.errors import UserError

SETS = {"synthetic": 64, "msrvtt": 1500, "msvd": 2423}  # answers, the most frequent of training


def get_config(dataset: str = "synthetic"):
    if dataset not in SETS:
        raise UserError(f"configs/qa.py:{dataset}: the sets are {', '.join(SETS)}")
    c = config.finetuning("qa", "tiny" if dataset == "synthetic" else "base")
    c.data.sets = ((f"{dataset}/qa", 1.0),)
    c.model.num_answers = SETS[dataset]
    if dataset != "synthetic":
        c.data.eval_split = "test"
    return c
