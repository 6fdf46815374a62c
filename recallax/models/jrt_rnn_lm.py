"""JRT-RNN's published language models: BASED's, with linear attention layers that read the prefix twice.

The layers are BASED's (`recallax.models.based_lm`), with one gated convolution less at 360M. The first 1024 tokens of a
prompt at most are read as `SeqInfo.prefix`; later tokens are read causally.
Source: Arora et al. 2024 (Just Read Twice, arXiv 2407.05483), section 4 and appendix; the released configs.
"""

from dataclasses import replace

from recallax.layers import Based, PrefixLinear
from recallax.models import based_lm
from recallax.models.lm import LMConfig

PREFIX_LENGTH = 1024
"""Encoder tokens M of the published models, which were trained on rows of 2048 tokens."""
MASK_TOKEN_ID = 50_263
"""The id of a masked token: one of the padding ids of GPT-2's vocabulary."""


def jrt_rnn_360m() -> LMConfig:
    """Return JRT-RNN-360M: 26 layers of width 1024, 356.6M parameters (356M in the paper).

    Returns:
        The model config.
    """
    return _jrt_rnn(replace(based_lm.based_360m(), pattern="conv (based window conv*3)*5"))


def jrt_rnn_1b3() -> LMConfig:
    """Return JRT-RNN-1.3B: 36 layers of width 1792, 1375M parameters.

    Returns:
        The model config.
    """
    return _jrt_rnn(based_lm.based_1b3())


def _jrt_rnn(config: LMConfig) -> LMConfig:
    memory = config.blocks["based"].mixer
    assert isinstance(memory, Based)
    block = replace(config.blocks["based"], mixer=PrefixLinear(memory=memory, max_prefix_len=PREFIX_LENGTH))
    return replace(config, blocks=config.blocks | {"based": block})
