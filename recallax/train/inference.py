"""What a trained run writes: behind a user's text or token ids, or behind its task's rows up to their first question.

A model of this project may answer at the question's own place, so what it writes first is compared with what the task
wants there; where the row itself goes on with the answer (copying), with all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Int

from recallax.config import ConfigError, from_json
from recallax.models.generation import Generator
from recallax.models.lm import LM
from recallax.models.prompts import PromptError, TokenIds, pad_prompts
from recallax.models.sampling import Greedy, Sampling
from recallax.tasks import ContextRepetition
from recallax.tasks.base import Split, Task
from recallax.tasks.encoder import Encoder
from recallax.train.loop import restore_run
from recallax.train.progress import printable
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import read_config
from recallax.types import Batch

DEFAULT_MAX_NEW_TOKENS = 16
"""Tokens behind a prompt, if nothing is said."""
ANSWER_SAMPLE_ROWS = 32
"""Rows that show whether a task's rows go on with their answers."""
MAX_PROMPTS_PER_BATCH = 8
"""Questions to one context that are read together."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to write."""

    max_new_tokens: int | None = None
    """Tokens; None is `DEFAULT_MAX_NEW_TOKENS`, or as many as a task's answer has."""
    stop_token_ids: tuple[int, ...] = ()
    sampling: Sampling = Greedy()
    seed: int = 0
    prefill_chunk_size: int | None = None
    """Tokens of a prompt to read at a time; None is all."""


class TaskQuestion(NamedTuple):
    """A row of a task up to its first question."""

    prompt: Int[np.ndarray, " N"]
    prefix_length: int
    answer: Int[np.ndarray, " M"]
    group: str


def continue_prompts(
    run: Path, prompts: Sequence[str], context: str | None, rereading: ContextRepetition, options: GenerationOptions
) -> list[str]:
    """What a run's newest checkpoint writes behind each prompt, behind a context that is read once as their prefix, if
    there is one: text for a run on text, which then stops where the document ends; else token ids.

    Raises what `restore_run` raises, ConfigError and PromptError.
    """
    if context is None and rereading != ContextRepetition():
        raise ConfigError("num_repeats, fill_strategy and prefix_length apply to a context; give one with --context")
    encoder = load_task(run).encoder
    asked = [_encode_prompt(prompt, "prompt", encoder, first=context is None) for prompt in prompts]
    ahead = None if context is None else _encode_prompt(context, "context", encoder, first=True)
    task, model = load_trained_model(run)
    if encoder is not None:
        options = replace(options, stop_token_ids=(*options.stop_token_ids, encoder.eos_id))
    new = DEFAULT_MAX_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
    longest = max(map(len, asked))
    if ahead is None:
        generator = _generator(model, longest + new, options)
        begun = generator.prefill(pad_prompts(asked), chunk_size=options.prefill_chunk_size)
        found = generator.generate(begun, new, seed=options.seed).sequences()
    else:
        ahead = rereading.apply_to_context(ahead, task)
        generator = _generator(model, len(ahead) + longest + new, options)
        begun = generator.prefill(
            pad_prompts([ahead], prefix_lengths=len(ahead)), chunk_size=options.prefill_chunk_size
        )
        found = generator.answer(
            begun, asked, new, batch_size=min(len(asked), MAX_PROMPTS_PER_BATCH), seed=options.seed
        )
    return [_format_ids(row) if encoder is None else _decode_text(encoder, row) for row in found]


def answer_task(
    run: Path, split: Split, num_rows: int, rereading: ContextRepetition, options: GenerationOptions
) -> list[str]:
    """A table of questions of the run's task, what was wanted, and what its newest checkpoint writes.

    Raises what `restore_run` raises, ConfigError and PromptError."""
    if num_rows < 1:
        raise ConfigError(f"--task-rows is {num_rows}; it must be at least 1")
    task, model = load_trained_model(run)
    task = rereading.apply_to_task(task)
    questions = [first_question(task, split, index) for index in range(num_rows)]
    new = (
        max(len(question.answer) for question in questions)
        if options.max_new_tokens is None
        else options.max_new_tokens
    )
    generator = _generator(model, max(len(question.prompt) for question in questions) + new, options)
    prompts = pad_prompts([q.prompt for q in questions], prefix_lengths=[q.prefix_length for q in questions])
    found = generator.generate(
        generator.prefill(prompts, chunk_size=options.prefill_chunk_size), new, seed=options.seed
    ).sequences()
    lines, right = [("group", "tokens", "wanted", "answer", "")], 0
    for question, row in zip(questions, found, strict=True):
        good = np.array_equal(row[: len(question.answer)], question.answer)
        right += good
        shown = (question.group, str(len(question.prompt)), _format_ids(question.answer), _format_ids(row))
        lines.append((*shown, "right" if good else "wrong"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [*table, f"{right} of {num_rows} right"]


def first_question(task: Task, split: Split, index: int, seed: int = 0) -> TaskQuestion:
    """The first row of that batch up to the first place that carries weight, and the answer there. It has more than
    one token where all of the batch's rows go on with what was wanted."""
    batch = task.batch(seed, split, index, ANSWER_SAMPLE_ROWS)
    weighted = np.asarray(batch.weights) > 0
    at = weighted.argmax(axis=1)
    if not weighted.any(axis=1).all():
        raise PromptError(f"batch {index} of {split} has rows without a question; take another task")
    tokens, here = np.asarray(batch.tokens)[0], int(at[0])
    first = here - int(np.asarray(batch.seq.positions)[0, here])
    prefix = int(np.asarray(batch.seq.prefix)[0, first : here + 1].sum())
    wanted = np.asarray(batch.targets)[0, here : here + _answer_length(batch, at)]
    group = task.groups[int(np.asarray(batch.group)[0, here])]
    return TaskQuestion(tokens[first : here + 1], prefix, wanted, group)


def load_task(run: Path) -> Task:
    """A run's task. Raises RunFolderError or ConfigError."""
    return from_json(read_config(run), RunConfig).task


def load_trained_model(run: Path) -> tuple[Task, LM]:
    """A run's task, and its model with the weights of its newest checkpoint."""
    program, restored = restore_run(run)
    model = nnx.merge(program.graphdef, restored.state.params, restored.state.statistics)
    return program.config.task, model


def parse_token_ids(text: str, what: str) -> Int[np.ndarray, " N"]:
    """Ids separated by spaces. Raises PromptError naming the word that is none."""
    words = text.replace(",", " ").split()
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 10):
            raise PromptError(f"the {what} {text!r} has the word {word!r}; it must be token ids separated by spaces")
    if not words:
        raise PromptError(f"the {what} {text!r} is empty; give at least one token id")
    return np.array([int(word) for word in words], np.int32)


def _generator(model: LM, max_len: int, options: GenerationOptions) -> Generator:
    return Generator(model, max_len=max(max_len, 2), sampling=options.sampling, stop_token_ids=options.stop_token_ids)


def _answer_length(batch: Batch, positions: Int[np.ndarray, " B"]) -> int:
    tokens, targets, weights = (np.asarray(x) for x in (batch.tokens, batch.targets, batch.weights))
    row, length = np.arange(len(positions)), 1
    while (after := positions + length).max() < tokens.shape[1]:
        goes_on = (weights[row, after] > 0) & (tokens[row, after] == targets[row, after - 1])
        if not goes_on.all():
            break
        length += 1
    return length


def _encode_prompt(text: str, what: str, encoder: Encoder | None, *, first: bool) -> Int[np.ndarray, " N"]:
    """Of text where the run has text: what comes first begins a document."""
    if encoder is None:
        return parse_token_ids(text, what)
    ids = encoder.encode([text])[0].astype(np.int32)
    if not first and not len(ids):
        raise PromptError(f"the {what} {text!r} is empty; give at least one letter")
    return np.concatenate([[encoder.bos_id], ids]).astype(np.int32) if first else ids


def _decode_text(encoder: Encoder, ids: TokenIds) -> str:
    """On as many lines as it has, without what could move a cursor."""
    return "\n".join(map(printable, encoder.decode([int(i) for i in ids]).split("\n")))


def _format_ids(ids: TokenIds) -> str:
    return " ".join(map(str, ids))
