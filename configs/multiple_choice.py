"""Fine-tune and evaluate multiple choice: which of five captions belongs to the clip?

    python -m stoa_jax.main --config=configs/multiple_choice.py:msrvtt --workdir=runs/choice \
        --config.init.path=runs/pretrain

Zero-shot from retrieval: --mode=eval --config.init.path=runs/retrieval and an empty --workdir.
Sets: synthetic, msrvtt (trained on the captions of the 7k list, as it has no training choices; the
9k list holds 1,990 of the 2,990 test videos).

synthetic, after `configs/pretrain.py:synthetic`, on two CPU cores (Intel Xeon): 31.0 % of 200 test
choices, in 1.7 minutes and 1.8 GiB (`python -m benchmarks.configs`). msrvtt: not measured.
"""

from stoa_jax import config
from stoa_jax.data.sources import data_set_for


def get_config(dataset: str = "synthetic"):
    data_set = data_set_for("multiple_choice", dataset)
    if dataset == "synthetic":
        return synthetic(data_set)
    c = config.finetuning("multiple_choice")
    config.set_losses(c, ota=1.0, asp=1.0)
    c.optim.groups = ((config.NEW, 1e-4), (config.TOWERS, 1e-6), (r"^fusion/", 1e-5), (r".*", 1e-4))
    c.data.sets = (("msrvtt/retrieval", 1.0),)  # the only published set has no training choices
    c.data.train_split = "train_7k"
    c.data.eval_set = data_set.name
    c.data.eval_split = "test"
    return c


def synthetic(data_set):
    c = config.small("multiple_choice")
    config.set_losses(c, ota=0.1, asp=0.1)
    c.data.sets = ((data_set.name, 1.0),)
    c.train.steps = 150
    return c
