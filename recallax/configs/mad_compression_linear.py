"""Linear attention on the compression task of MAD.

Question: how much of a sequence can the last hidden state contain? Vocabulary 16, length 32; a decoder of its own
reconstructs the sequence from the last token (Poli et al. 2024, arXiv 2403.17844). Expected: accuracy 0.4 to 0.5, as in
the published tables. Cost: minutes on a GPU.

    recallax train mad_compression_linear
"""

from recallax.layers import LinearAttention
from recallax.models import Autoencoder
from recallax.models.hybrid_lm import hybrid
from recallax.tasks import Compression
from recallax.train.run_config import AdamW, RunConfig, Train, tiny_run

MIXER = LinearAttention(feature_map="identity", num_heads=2)


def get_config() -> RunConfig:
    return RunConfig(
        task=Compression(),
        model=hybrid(MIXER, 128, Autoencoder()),
        optim=AdamW(lr=1e-3),
        train=Train(steps=10_000, batch_size=128),
    )


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), task=Compression(vocab_size=8, length=8), model=hybrid(MIXER, 16, Autoencoder()))
