"""The language model: an embedding, a stack of blocks, a final norm and a language model head."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from recallax.config import Config, ConfigError, added_field, require_at_least
from recallax.config_errors import raise_config_errors, run_checks
from recallax.layers.base import State
from recallax.layers.dense import parameter
from recallax.layers.norm import RMSNorm
from recallax.models.block import Block, dropout
from recallax.models.document_limits import DocumentLimits, LayerLimits
from recallax.models.hgrn2_lower_bounds import HGRN2LowerBounds, hgrn2_cells_at
from recallax.models.landmark_tokens import LandmarkTokens, drop_landmarks
from recallax.models.lm_head import LMHead, LogitProjection, Tied
from recallax.models.padding import rotate_to_right_padding
from recallax.models.parameter_paths import layer_paths
from recallax.models.pattern import Term, flatten_pattern, parse_pattern
from recallax.models.stack import Remat, Stack, StackSpec
from recallax.pallas_kernels.grid import gather_tokens
from recallax.types import Aux, Precision, SeqInfo, StepInfo, check_shapes

EMBED_DROPOUT_KEY = 2**31 - 1
"""Folded into the key of the embeddings' dropout; layers fold in their number."""


@dataclass(frozen=True, kw_only=True)
class LMConfig(Config):
    """A language model as a pattern over named blocks (`recallax.models.pattern`)."""

    d_model: int
    """Width of the residual stream."""
    pattern: str
    """The layers, as names of blocks with repeats, for example `conv (based window)*2`."""
    blocks: dict[str, Block]
    """Blocks by name."""
    vocab_size: int | None = None
    """None: use the task's vocabulary size."""
    lm_head: LMHead = Tied()
    """The map from hidden states to logits."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products; parameters, residual stream, recurrent states and sums over time are float32."""
    dropout: float = 0.0
    """Dropout rate of each mixer's output."""
    embed_dropout: float = 0.0
    """Dropout rate of the embeddings."""
    norm_eps: float = added_field(1e-5)
    """Epsilon of the norms before mixers and before the head."""
    soft_cap: float | None = added_field(None)
    """c in logits c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2). None: no cap."""
    remat: Remat = "none"
    """`block`: recompute each layer in the backward pass instead of storing its activations."""

    def __post_init__(self) -> None:
        run_checks(
            lambda: parse_pattern(self.pattern, list(self.blocks)),
            lambda: require_at_least(1, d_model=self.d_model),
            self._check_numbers,
        )
        if len(sizes := self._landmark_block_sizes) > 1:
            raise ConfigError(f"layers have the landmark block sizes {sorted(sizes)}; a model's layers must agree")

    def _check_numbers(self) -> None:
        rates = {"dropout": self.dropout, "embed_dropout": self.embed_dropout}
        messages = [f"{n} is {x}; it must be at least 0 and below 1" for n, x in rates.items() if not 0 <= x < 1]
        if self.soft_cap is not None and self.soft_cap <= 0:
            messages.append(f"soft_cap is {self.soft_cap}; it must be above 0, or None for no cap")
        if self.norm_eps <= 0:
            messages.append(f"norm_eps is {self.norm_eps}; it must be above 0")
        raise_config_errors(messages)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The parsed pattern."""
        return parse_pattern(self.pattern, list(self.blocks))

    @property
    def layer_names(self) -> list[str]:
        """The name of the block of each layer."""
        return flatten_pattern(self.terms)

    @property
    def landmark_block_size(self) -> int | None:
        """Tokens before each landmark that the model inserts; None: no landmarks."""
        return next(iter(self._landmark_block_sizes), None)

    @property
    def document_limits(self) -> DocumentLimits:
        """Limits of the layers on the documents of a row."""
        blocks = {name: self.blocks[name] for name in self.layer_names}
        mixers = [(name, mixer) for name, block in blocks.items() for mixer in (block.mixer, block.channel)]
        limits = [LayerLimits(f"{type(m).__name__} of block {n!r}", m.grid, m.prefix_limit) for n, m in mixers]
        layers = tuple(layer for layer in limits if layer.grid > 1 or layer.prefix_limit is not None)
        return DocumentLimits(layers=layers, landmark_block_size=self.landmark_block_size)

    @property
    def _landmark_block_sizes(self) -> set[int]:
        intervals = {self.blocks[name].mixer.landmark_interval for name in set(self.layer_names)}
        return {interval for interval in intervals if interval is not None}

    def build(self, rngs: nnx.Rngs, vocab_size: int | None = None) -> "LM":
        """Build the model.

        Args:
            rngs: Random number generators of the parameters.
            vocab_size: The task's vocabulary size, for configs without one.

        Returns:
            The model.

        Raises:
            ConfigError: If no vocabulary size is given, or the model's is smaller than the task's.
        """
        vocab = self.vocab_size or vocab_size
        if vocab is None:
            raise ConfigError("vocab_size is None and there is no task that defines it; set model.vocab_size")
        if vocab_size is not None and vocab < vocab_size:
            raise ConfigError(f"model.vocab_size is {vocab}; the task has {vocab_size} token ids")
        return LM(self, vocab, rngs)


class LM(nnx.Module):
    """Language model: embedding, stack of blocks, final norm, language model head.

    Rows with padding on the left are rotated on entry and back at the end, so mixers see padding on the right only.

    Args:
        config: The model config.
        vocab_size: The number of token ids.
        rngs: Random number generators of the parameters.
    """

    def __init__(self, config: LMConfig, vocab_size: int, rngs: nnx.Rngs):
        precision = Precision(compute=jnp.dtype(config.compute_dtype).type)
        width = config.d_model
        embedding = 0.02 * jax.random.normal(rngs.params(), (vocab_size, width), precision.param)
        self.embedding = parameter(embedding, ("vocab", "embed"))
        terms = config.terms
        depth = sum(term.num_layers for term in terms)
        spec = StackSpec(
            config.blocks, width, depth, config.dropout, config.norm_eps, config.remat, precision, rngs.params()
        )
        self.stack = Stack(terms, spec, 0)
        layers = layer_paths(terms)
        has_hgrn2 = any(hgrn2_cells_at(self, layer.path) for layer in layers)
        self.floors = HGRN2LowerBounds(self, layers, precision=precision) if has_hgrn2 else None
        self.norm = RMSNorm(width, precision=precision, eps=config.norm_eps)
        self.readout = config.lm_head.build(width, vocab_size, precision=precision, rngs=rngs)
        block_size = config.landmark_block_size
        self.landmarks = (
            None if block_size is None else LandmarkTokens(block_size, width, precision=precision, rngs=rngs)
        )
        self.document_limits = config.document_limits
        self.embed_dropout = config.embed_dropout
        self.soft_cap = config.soft_cap

    def __call__(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, logit_indices: Int[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N V"], Aux]:
        """Compute logits.

        Args:
            tokens: Token ids.
            seq: Positions, document ids and prefixes, and the key of dropout (None: no dropout).
            logit_indices: Indices of the tokens whose logits are returned. None: all tokens.

        Returns:
            Float32 logits, and the auxiliary means of the modules by name.

        Raises:
            DocumentLayoutError: If the documents of concrete rows exceed the limits of a layer.
        """
        projection, aux = self.logit_projection(tokens, seq, logit_indices)
        return projection.logits(), aux

    def logit_projection(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, logit_indices: Int[Array, "B N"] | None = None
    ) -> tuple[LogitProjection, Aux]:
        """Compute the factors of the logits, without their product, so that a loss need not store all logits.

        Args:
            tokens: Token ids.
            seq: Positions, document ids and prefixes, and the key of dropout (None: no dropout).
            logit_indices: Indices of the tokens whose logits are returned. None: all tokens.

        Returns:
            The projection, and the auxiliary means of the modules by name.

        Raises:
            DocumentLayoutError: If the documents of concrete rows exceed the limits of a layer.
        """
        self.apply_lower_bounds()
        self.document_limits.check_call(seq)
        tokens, seq, shift = rotate_to_right_padding(tokens, seq)
        x = self._embed(tokens, seq)
        if self.landmarks is None:
            r, aux = self.stack(x, seq, 0)
        else:
            x, expanded_seq, indices = self.landmarks.insert(x, seq)
            r, aux = self.stack(x, expanded_seq, 0)
            r = drop_landmarks(r, indices)
        return self._project_at(r, seq, logit_indices, shift), aux

    def init_state(self, batch: int, max_len: int) -> State:
        """Return the state before any token; its bytes are the model's memory.

        Args:
            batch: The number of rows.
            max_len: Largest number of tokens per row.

        Returns:
            The state.
        """
        return self.stack.init_state(
            batch, max_len if self.landmarks is None else self.landmarks.expanded_length(max_len)
        )

    def prefill(
        self, tokens: Int[Array, "B T"], seq: SeqInfo, state: State, logit_indices: Int[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N V"], State, Aux]:
        """Read further tokens of each row.

        Args:
            tokens: Token ids, T >= 1.
            seq: Their sequence information; positions continue those of the state's documents, and 0 resets the state.
            state: The state before the tokens.
            logit_indices: Indices of the tokens whose logits are returned. None: all tokens.

        Returns:
            Float32 logits, the state after the tokens, and the auxiliary means of the modules by name.

        Raises:
            DocumentLayoutError: If the documents of concrete rows exceed the limits of a layer.
        """
        self.apply_lower_bounds()
        self.document_limits.check_call(seq, continued=True)
        tokens, seq, shift = rotate_to_right_padding(tokens, seq._replace(key=None))
        x = self._embed(tokens, seq)
        if self.landmarks is None:
            r, state, aux = self.stack.prefill(x, seq, state)
        else:
            x, expanded_seq, indices = self.landmarks.insert(x, seq)
            r, state, aux = self.stack.prefill(x, expanded_seq, state)
            r = drop_landmarks(r, indices)
        return self._project_at(r, seq, logit_indices, shift).logits(), state, aux

    def step(self, token: Int[Array, " B"], info: StepInfo, state: State) -> tuple[Float[Array, "B V"], State]:
        """Read one token of each active row.

        Args:
            token: Token ids.
            info: Positions in the documents, and the rows that are active.
            state: The state before the token.

        Returns:
            Float32 logits, and the state after the token; inactive rows keep their state.
        """
        check_shapes(info)
        self.apply_lower_bounds()
        x = self.embedding[token].astype(jnp.float32)
        r, state = self.stack.step(x, info if self.landmarks is None else self.landmarks.token_step_info(info), state)
        state = self._landmark_step(info, state)
        return self.last_token_logits(r, jnp.asarray(info.position)[:, None]), state

    def _landmark_step(self, info: StepInfo, state: State) -> State:
        """Return the state after the landmark that follows a token, in rows where one follows."""
        if self.landmarks is None:
            return state
        landmark, x = self.landmarks.landmark_step_info(info), self.landmarks.embedding_rows(info.position.shape[0])
        return jax.lax.cond(landmark.active.any(), lambda s: self.stack.step(x, landmark, s)[1], lambda s: s, state)

    def last_token_logits(self, r: Float[Array, "B D"], position: Int[Array, "B 1"]) -> Float[Array, "B V"]:
        """Compute logits from the stack's output at one token of each row.

        Args:
            r: The residual stream at the token.
            position: The token's position in its document.

        Returns:
            Float32 logits.
        """
        hidden = self.norm(r)
        return self._apply_lm_head(hidden[:, None], hidden, position).logits()[:, 0]

    def apply_lower_bounds(self) -> None:
        """Set the lower bounds of HGRN2 layers, if there are any."""
        if self.floors is not None:
            self.floors.apply(self)

    def _embed(self, tokens: Int[Array, "B T"], seq: SeqInfo) -> Float[Array, "B T D"]:
        x = self.embedding[tokens].astype(jnp.float32)
        return x if seq.key is None else dropout(x, self.embed_dropout, jax.random.fold_in(seq.key, EMBED_DROPOUT_KEY))

    def _project_at(
        self, r: Float[Array, "B T D"], seq: SeqInfo, logit_indices: Int[Array, "B N"] | None, shift: Int[Array, " B"]
    ) -> LogitProjection:
        length = r.shape[1]
        all_indices = jnp.arange(length)[None]
        if logit_indices is None:
            source = (all_indices - shift[:, None]) % length
            hidden = jax.lax.cond(shift.any(), lambda: gather_tokens(r, source), lambda: r)
        else:
            source = (jnp.asarray(logit_indices) - shift[:, None]) % length
            hidden = gather_tokens(r, source)
        last = jnp.max(jnp.where(jnp.asarray(seq.segment_ids) > 0, all_indices, 0), axis=1, keepdims=True)
        last_hidden = self.norm(gather_tokens(r, last)[:, 0])
        positions = gather_tokens(jnp.asarray(seq.positions), source)
        return self._apply_lm_head(self.norm(hidden), last_hidden, positions)

    def _apply_lm_head(
        self, hidden: Float[Array, "B N D"], last_hidden: Float[Array, "B D"], positions: Int[Array, "B N"]
    ) -> LogitProjection:
        return self.readout(hidden, self.embedding[...], last_hidden, positions)._replace(soft_cap=self.soft_cap)
