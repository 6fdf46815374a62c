"""How much of a sequence can a model put into its last hidden state? MAD's compression.

Vocabulary 16, length 32, rebuilt by a readout of its own from the last token (Poli et al. 2024, arXiv 2403.17844).
Expected: 40 to 50 %, as the published tables. Cost: minutes on a GPU.

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
