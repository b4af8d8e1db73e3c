"""Train all heads together: pre-training, captions, questions and choices of one world.

    bash launch/train_synthetic.sh [WORKDIR]

runs the stages in order, each from the weights of the one before:

    python -m stoa_jax.main --config=configs/joint.py:STAGE --workdir=runs/STAGE \
        --config.init.path=BEFORE

words: captions and questions, from the CLIP of configs/clip.py:live. Fusion learns to read.
motion: only trajectories learn, toward the nouns, verbs and adjectives of captions, at a fifth of
the cost per step.
heads: captions, questions and choices together, on trajectories that now identify motions.
match: the same with VTM, for the match head.

The world is rendered live, without a build. Time and scores are on the card of the checkpoint that
ships, stoa_jax/checkpoints/synthetic/README.md.
"""

from stoa_jax import config
from stoa_jax.errors import UserError

STAGES = ("words", "motion", "heads", "match")


def get_config(stage: str = "heads"):
    if stage not in STAGES:
        raise UserError(f"configs/joint.py:{stage}: the stages are {', '.join(STAGES)}")
    c = config.live("joint", "small")
    c.model.alignment_target = "alone"
    c.model.trajectory_verbs = c.model.trajectory_adjectives = True
    c.model.num_answers = 41  # every possible answer
    c.data.questions, c.data.choices = "synthetic/qa", "synthetic/multiple_choice"
    c.data.crop = "center"
    c.train.keep_vision = True
    c.train.batch_size = 32
    c.loss.none_weight = 0.1
    c.loss.match_names = True
    c.loss.seen_words = True
    c.checkpoint.every_steps = 200
    c.log.every_steps = 25
    c.eval.every_steps = -1  # evaluated from the checkpoint
    c.eval.beam = 1
    config.set_losses(c, vtc=0.5, plm=1.0, ota=0.5, asp=0.1, verb=1.0, adjective=0.25)
    c.loss.choice = 0.0
    c.data.questions_per_clip = 3
    c.optim.groups = rates(1.5e-3, 5e-4)
    if stage == "words":
        c.init.reinit = r"^fusion/blocks"  # a text tower's layers are a poor start for fusion here
        c.loss.adjective = 1.0  # later less, because adjectives slow the learning of verbs
        c.optim.schedule = "constant"
        c.train.steps = 1000
    elif stage == "motion":
        config.set_losses(c, ota=0.5, verb=1.0, adjective=0.25)
        c.loss.answer = 0.0
        c.optim.groups = ((r"^(regions|trajectory)/", 2e-3), (r".*", 0.0))
        c.train.steps = 3000
    elif stage == "heads":
        c.loss.choice = 1.0
        c.optim.warmup = 0.05
        c.train.steps = 1300
    else:
        c.loss.vtm = c.loss.choice = 1.0
        c.data.questions_per_clip = 2
        c.optim.warmup = 0.1
        c.optim.groups = rates(5e-4, 2e-4)
        c.train.steps = 300
    return c


def rates(new: float, text: float):
    """Return the learning rates by group; the vision tower stays frozen."""
    return ((r"^visual/", 0.0), (config.NEW, new), (config.TOWERS, text), (r".*", new))
