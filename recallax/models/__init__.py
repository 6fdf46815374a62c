"""Models: the language model, its generation and accounting, and published architectures as configs.

The published architectures are in modules of their own: `based_lm`, `hybrid_lm`, `hydra_lm`, `jrt_rnn_lm`,
`landmark_lm`, `mom_lm`, `titans_lm` and `zoology_lm`.
"""

from recallax.models.accounting import (
    abstract_model,
    count_active_parameters,
    count_parameters,
    forward_flops,
    parameter_table,
    state_bytes,
)
from recallax.models.block import Block
from recallax.models.decoding import NO_TOKEN, DecodingState, GenerationOutput, NonFiniteLogitsError
from recallax.models.document_limits import DocumentLayoutError, DocumentLimits, raise_in_compiled_programs
from recallax.models.generation import Generator
from recallax.models.lm import LM, LMConfig
from recallax.models.lm_head import Autoencoder, LMHead, LogitProjection, Tied, Untied
from recallax.models.pattern import compress_pattern, flatten_pattern, parse_pattern
from recallax.models.prompts import PromptError, Prompts, pad_prompts, unpack_documents
from recallax.models.sampling import Greedy, MultinomialSampling, Sampling

__all__ = [
    "LM",
    "NO_TOKEN",
    "Autoencoder",
    "Block",
    "DecodingState",
    "DocumentLayoutError",
    "DocumentLimits",
    "GenerationOutput",
    "Generator",
    "Greedy",
    "LMConfig",
    "LMHead",
    "LogitProjection",
    "MultinomialSampling",
    "NonFiniteLogitsError",
    "PromptError",
    "Prompts",
    "Sampling",
    "Tied",
    "Untied",
    "abstract_model",
    "compress_pattern",
    "count_active_parameters",
    "count_parameters",
    "flatten_pattern",
    "forward_flops",
    "pad_prompts",
    "parameter_table",
    "parse_pattern",
    "raise_in_compiled_programs",
    "state_bytes",
    "unpack_documents",
]
