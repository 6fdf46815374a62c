"""BASED-360M on books: language modelling and recall on PG-19.

Question: which perplexity does the model reach, and which on tokens that it can recall? 28,602 books from before 1919
(Rae et al. 2020, arXiv 1911.05507) in rows of 2048 tokens, with a BPE of 50,257 ids that is trained on them; 10 billion
tokens, as many as the published models saw of the Pile. Expected: no published result on PG-19. On the Pile this model
has perplexity 8.65 (attention 8.39); on recall tokens, pure Taylor attention has 2.29 and attention 1.87.
Cost: 2.2e19 FLOPs, most of a day on one H100; a download of 11 GB, and about 17 GB in the two caches.

    recallax tokenizer based_360m_text --download --vocab-size 50257 --out tokenizers/pg19.json
    recallax corpus based_360m_text
    recallax train based_360m_text
"""

from dataclasses import replace

from recallax.configs import text_based
from recallax.configs.based_360m import mqar_at_pretraining_size
from recallax.models.based_lm import based_360m
from recallax.tasks import Text
from recallax.tasks.text import BPE, Tfds
from recallax.train.run_config import RunConfig, tiny_run


def get_config() -> RunConfig:
    text = Text(
        source=Tfds(name="pg19", feature="book_text"),
        tokenizer=BPE(file="tokenizers/pg19.json", vocab_size=50_257),
        length=2048,
    )
    return replace(mqar_at_pretraining_size(based_360m()), task=text)


def get_tiny() -> RunConfig:
    return tiny_run(get_config(), task=text_based.tiny_text(32), model=text_based.get_tiny().model)
