"""A state-space model on induction heads, with LongMamba for longer contexts.

Question: how far beyond its training length does the model find the token after a cue, and does LongMamba help? Two
layers of the diagonal state-space model, width 32, trained on rows of 32 tokens of 8 symbols, tested at up to 512
tokens. Expected: accuracy 1.00 at 32 tokens, 0.98 at 64, 0.65 at 128, 0.4 at 256; filters calibrated for 256 tokens
raise the accuracy there, and lower it at lengths that the model reads without them (`experiments/long_mamba`).
Cost: a minute on one CPU core.

    recallax train induction_ssm --run runs/ssm
    recallax calibrate runs/ssm --context-length 256
    recallax eval runs/ssm/long-256
"""

from recallax.layers import DiagonalSSM, NoChannelMixer
from recallax.models import Block, LMConfig
from recallax.tasks import InductionHeads
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train, tiny_run


def get_config() -> RunConfig:
    return RunConfig(
        task=InductionHeads(num_symbols=8, length=32, test_lengths=(32, 64, 128, 256, 512)),
        model=LMConfig(
            d_model=32,
            pattern="ssm*2",
            blocks={"ssm": Block(mixer=DiagonalSSM(max_timescale=32.0), channel=NoChannelMixer())},
        ),
        optim=AdamW(lr=4e-3),
        train=Train(steps=400, batch_size=64, save_every=200),
        evaluate=Evaluate(every=200, batches=20, batch_size=64),
    )


def get_tiny() -> RunConfig:
    model = LMConfig(
        d_model=16,
        pattern="ssm*2",
        blocks={"ssm": Block(mixer=DiagonalSSM(max_timescale=8.0), channel=NoChannelMixer())},
    )
    return tiny_run(get_config(), task=InductionHeads(num_symbols=6, length=12, test_lengths=(12, 24)), model=model)
