"""BASED-360M at its published size, on MQAR at the size of language-model pretraining.

Question: what does the model cost, and does it train? 27 layers, width 1024, 362.6M parameters; shape and optimizer
settings of the paper (arXiv 2402.18668). Expected: no published result on this task; tests check the counts of
`recallax show`. Cost: hours on one H100.

    recallax show based_360m
"""

from recallax.layers import Based, GatedConv, MixerConfig, SlidingWindow, SwiGLU
from recallax.models import Block, LMConfig
from recallax.models.based_lm import VOCAB_SIZE, based_360m
from recallax.tasks import MQAR, MixtureSlice
from recallax.train.run_config import AdamW, Evaluate, RunConfig, Train, tiny_run


def mqar_at_pretraining_size(model: LMConfig) -> RunConfig:
    """Return a run of a model on MQAR with the vocabulary, length, batch and optimizer of the published pretraining."""
    slices = (MixtureSlice(length=2048, num_kv_pairs=256),)
    return RunConfig(
        task=MQAR(vocab_size=model.vocab_size or VOCAB_SIZE, mixture=slices, test_mixture=slices),
        model=model,
        optim=AdamW(lr=8e-4, warmup_ratio=0.01),
        train=Train(steps=20_000, batch_size=256, gradient_accumulation_steps=8, save_every=1000),
        evaluate=Evaluate(every=1000, batches=4, batch_size=32),
    )


def mqar_at_pretraining_size_tiny(config: RunConfig, model: LMConfig) -> RunConfig:
    """Return the tiny form of a run that trains MQAR at a pretraining size.

    Args:
        config: The run.
        model: Its model at a small size.
    """
    slices = (MixtureSlice(length=16, num_kv_pairs=2),)
    return tiny_run(config, task=MQAR(vocab_size=32, mixture=slices, test_mixture=slices), model=model)


def tiny_based_blocks() -> dict[str, Block]:
    """Return the blocks of BASED at a size for tests."""

    def block(mixer: MixerConfig) -> Block:
        return Block(mixer=mixer, channel=SwiGLU(expand=2.0))

    return {
        "conv": block(GatedConv(conv_size=3)),
        "based": block(Based(feature_dim=4, num_heads=2)),
        "window": block(SlidingWindow(window=5, num_heads=2)),
    }


def get_config() -> RunConfig:
    return mqar_at_pretraining_size(based_360m())


def get_tiny() -> RunConfig:
    pattern = "conv (based window conv*3)*2 conv"
    model = LMConfig(d_model=16, pattern=pattern, blocks=tiny_based_blocks(), remat="block", compute_dtype="bfloat16")
    return mqar_at_pretraining_size_tiny(get_config(), model)
