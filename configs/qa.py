"""Fine-tune and evaluate question answering.

    python -m stoa_jax.main --config=configs/qa.py:msvd --workdir=runs/qa \
        --config.init.path=runs/pretrain

Sets: synthetic, msrvtt (1500 answers), msvd (2423 answers).

synthetic, after `configs/pretrain.py:synthetic`, on two CPU cores (Intel Xeon): 39.0 % of 1,000
test questions, in 1.5 minutes and 1.6 GiB (`python -m benchmarks.configs`). msrvtt, msvd: not
measured.
"""

from stoa_jax import config
from stoa_jax.data.sources import data_set_for


def get_config(dataset: str = "synthetic"):
    data_set = data_set_for("qa", dataset)
    if dataset == "synthetic":
        return synthetic(data_set)
    c = config.finetuning("qa")
    config.set_losses(c, ota=1.0, asp=1.0)
    c.optim.groups = ((config.NEW, 1e-4), (config.TOWERS, 1e-6), (r"^fusion/", 1e-5), (r".*", 1e-4))
    c.data.sets = ((data_set.name, 1.0),)
    c.data.eval_split = "test"
    c.model.num_answers = data_set.answers
    return c


def synthetic(data_set):
    c = config.small("qa")
    # At weight 1 the alignment losses are larger than the answer's loss and dominate it.
    config.set_losses(c, ota=0.1, asp=0.1)
    c.data.sets = ((data_set.name, 1.0),)
    c.model.num_answers = data_set.answers
    c.train.steps = 250
    return c
