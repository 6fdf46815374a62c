"""Generation with a trained run: continuations of prompts, and answers to the rows of its task.

A row of a task is read up to its first target. The first generated token is compared with the target there; in tasks
whose rows continue with the answer, such as copying, as many tokens are compared as the answer has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Int

from recallax.config import ConfigError, from_json, require_at_least
from recallax.external_file import printable
from recallax.models.generation import Generator
from recallax.models.lm import LM
from recallax.models.prompts import PromptError, TokenIds, pad_prompts
from recallax.models.sampling import Greedy, Sampling
from recallax.tasks import ContextRepetition
from recallax.tasks.base import Split, Task
from recallax.tasks.encoder import Encoder
from recallax.train.loop import restore_run
from recallax.train.run_config import RunConfig
from recallax.train.run_folder import read_config
from recallax.types import Batch

DEFAULT_MAX_NEW_TOKENS = 16
"""Default number of generated tokens."""
ANSWER_SAMPLE_ROWS = 32
"""Rows from which the length of the answers of a task is determined."""
MAX_PROMPTS_PER_BATCH = 8
"""Maximum number of prompts to one context in a batch."""


MAX_TOKEN_ID_DIGITS = 9
"""Digits of a token id, so that it fits int32."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of the generation."""

    max_new_tokens: int | None = None
    """Number of tokens; None: `DEFAULT_MAX_NEW_TOKENS`, or the length of the answers of the task."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sequence."""
    sampling: Sampling = Greedy()
    """Rule that selects the next token."""
    seed: int = 0
    """Seed of the sampling."""
    prefill_chunk_size: int | None = None
    """Number of prompt tokens to process at a time; None: all."""


class TaskQuestion(NamedTuple):
    """A row of a task up to its first target."""

    prompt: Int[np.ndarray, " N"]
    """Token ids."""
    prefix_length: int
    """Number of tokens of the prompt that may be read in both directions."""
    answer: Int[np.ndarray, " M"]
    """Expected token ids."""
    group: str
    """Group of the target in the metrics of the task."""


def continue_prompts(
    run: Path, prompts: Sequence[str], context: str | None, rereading: ContextRepetition, options: GenerationOptions
) -> list[str]:
    """Generate continuations of prompts with the newest checkpoint of a run.

    Args:
        run: Folder of the run.
        prompts: Text for a run on text, otherwise token ids separated by spaces.
        context: Text or token ids that are read once before all prompts; None for no context.
        rereading: Repetition of the context.
        options: Options of the generation.

    Returns:
        A continuation per prompt: text for a run on text, which stops at the end of the document, otherwise token ids.

    Raises:
        RunFolderError: The folder is not that of a run, or has no checkpoint.
        CheckpointError: No checkpoint can be restored.
        ConfigError: `rereading` is given without a context.
        PromptError: A prompt is empty, or not valid.
    """
    if context is None and rereading != ContextRepetition():
        raise ConfigError("num_repeats, fill_strategy and prefix_length apply to a context; give one with --context")
    encoder = load_task(run).encoder
    prompt_ids = [_encode_prompt(prompt, "prompt", encoder, first=context is None) for prompt in prompts]
    context_ids = None if context is None else _encode_prompt(context, "context", encoder, first=True)
    task, model = load_trained_model(run)
    if encoder is not None:
        options = replace(options, stop_token_ids=(*options.stop_token_ids, encoder.eos_id))
    num_new = DEFAULT_MAX_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
    longest, chunk_size, seed = max(map(len, prompt_ids)), options.prefill_chunk_size, options.seed
    if context_ids is None:
        generator = _generator(model, longest + num_new, options)
        prefilled = generator.prefill(pad_prompts(prompt_ids), chunk_size=chunk_size)
        rows = generator.generate(prefilled, num_new, seed=seed).sequences()
    else:
        context_ids = rereading.apply_to_context(context_ids, task)
        generator = _generator(model, len(context_ids) + longest + num_new, options)
        padded = pad_prompts([context_ids], prefix_lengths=len(context_ids))
        prefilled = generator.prefill(padded, chunk_size=chunk_size)
        batch_size = min(len(prompt_ids), MAX_PROMPTS_PER_BATCH)
        rows = generator.answer(prefilled, prompt_ids, num_new, batch_size=batch_size, seed=seed)
    if encoder is None:
        return [_format_ids(row) for row in rows]
    return [_decode_text(encoder, prompt, row) for prompt, row in zip(prompt_ids, rows, strict=True)]


def answer_task(
    run: Path, split: Split, num_rows: int, rereading: ContextRepetition, options: GenerationOptions
) -> list[str]:
    """Answer rows of the task of a run with its newest checkpoint.

    Args:
        run: Folder of the run.
        split: Split of the rows.
        num_rows: Number of rows.
        rereading: Repetition of the context of the rows.
        options: Options of the generation.

    Returns:
        Lines of a table with the expected and the generated token ids, and the number of correct rows.

    Raises:
        RunFolderError: The folder is not that of a run, or has no checkpoint.
        CheckpointError: No checkpoint can be restored.
        ConfigError: `num_rows` is below 1, or `rereading` does not fit the task.
        PromptError: A batch has rows without a target.
    """
    require_at_least(1, "--", **{"task-rows": num_rows})
    task, model = load_trained_model(run)
    task = rereading.apply_to_task(task)
    questions = [first_question(task, split, index) for index in range(num_rows)]
    num_new = max(len(q.answer) for q in questions) if options.max_new_tokens is None else options.max_new_tokens
    generator = _generator(model, max(len(q.prompt) for q in questions) + num_new, options)
    prompts = pad_prompts([q.prompt for q in questions], prefix_lengths=[q.prefix_length for q in questions])
    prefilled = generator.prefill(prompts, chunk_size=options.prefill_chunk_size)
    rows = generator.generate(prefilled, num_new, seed=options.seed).sequences()
    return _answer_table(questions, rows)


def _answer_table(questions: Sequence[TaskQuestion], rows: Sequence[TokenIds]) -> list[str]:
    lines, num_correct = [("group", "tokens", "expected", "answer", "")], 0
    for question, row in zip(questions, rows, strict=True):
        is_correct = np.array_equal(row[: len(question.answer)], question.answer)
        num_correct += is_correct
        cells = (question.group, str(len(question.prompt)), _format_ids(question.answer), _format_ids(row))
        lines.append((*cells, "correct" if is_correct else "wrong"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [*table, f"{num_correct} of {len(questions)} correct"]


def first_question(task: Task, split: Split, index: int, seed: int = 0) -> TaskQuestion:
    """Return the first row of a batch up to its first target, and the answer there.

    The answer has more than one token if all rows of the batch continue with their targets.

    Args:
        task: The task.
        split: Split of the batch.
        index: Number of the batch.
        seed: Seed of the data.

    Returns:
        The row and its answer.

    Raises:
        PromptError: A row of the batch has no target.
    """
    batch = task.batch(seed, split, index, ANSWER_SAMPLE_ROWS)
    labelled = np.asarray(batch.weights) > 0
    positions = labelled.argmax(axis=1)
    if not labelled.any(axis=1).all():
        raise PromptError(f"batch {index} of {split} has rows without a target; use another task")
    tokens, target = np.asarray(batch.tokens)[0], int(positions[0])
    start = target - int(np.asarray(batch.seq.positions)[0, target])
    prefix_length = int(np.asarray(batch.seq.prefix)[0, start : target + 1].sum())
    answer = np.asarray(batch.targets)[0, target : target + _answer_length(batch, positions)]
    group = task.groups[int(np.asarray(batch.group)[0, target])]
    return TaskQuestion(tokens[start : target + 1], prefix_length, answer, group)


def load_task(run: Path) -> Task:
    """Return the task of a run; raises RunFolderError or ConfigError if its config cannot be read."""
    return from_json(read_config(run), RunConfig).task


def load_trained_model(run: Path) -> tuple[Task, LM]:
    """Restore the model of a run from its newest checkpoint.

    Args:
        run: Folder of the run.

    Returns:
        The task of the run, and the model.

    Raises:
        RunFolderError: The folder is not that of a run, or has no checkpoint.
        CheckpointError: No checkpoint can be restored.
        ConfigError: The config does not fit this version.
    """
    program, restored = restore_run(run)
    model = nnx.merge(program.graphdef, restored.state.params, restored.state.statistics)
    return program.config.task, model


def parse_token_ids(text: str, what: str) -> Int[np.ndarray, " N"]:
    """Parse token ids.

    Args:
        text: Ids separated by spaces or commas.
        what: Name of the text in error messages.

    Returns:
        The ids.

    Raises:
        PromptError: A word is not a token id, or there is none.
    """
    words = text.replace(",", " ").split()
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) <= MAX_TOKEN_ID_DIGITS):
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
        is_answer = (weights[row, after] > 0) & (tokens[row, after] == targets[row, after - 1])
        if not is_answer.all():
            break
        length += 1
    return length


def _encode_prompt(text: str, what: str, encoder: Encoder | None, *, first: bool) -> Int[np.ndarray, " N"]:
    """Return the token ids of a prompt; text that comes first starts with the beginning-of-document token."""
    if encoder is None:
        return parse_token_ids(text, what)
    ids = encoder.encode([text])[0].astype(np.int32)
    if not first and not len(ids):
        raise PromptError(f"the {what} {text!r} is empty; give at least one letter")
    return np.concatenate([[encoder.bos_id], ids]).astype(np.int32) if first else ids


def _decode_text(encoder: Encoder, prompt: TokenIds, ids: TokenIds) -> str:
    """Decode token ids after a prompt to text without control characters, with its line breaks."""
    text = encoder.decode_continuation([int(i) for i in prompt], [int(i) for i in ids])
    return "\n".join(map(printable, text.split("\n")))


def _format_ids(ids: TokenIds) -> str:
    return " ".join(map(str, ids))
