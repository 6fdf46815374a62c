"""`recallax generate`: generate from prompts, or answer rows of the run's task."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from recallax.cli.options import ContextRepetitionArguments, ContextRepetitionOptions, parse_options
from recallax.config import ConfigError

if TYPE_CHECKING:
    from recallax.models.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Generate from prompts with the newest checkpoint of a run, or answer rows of the run's task."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: tuple[str, ...] = ()
    """Prompts to continue: text for a run on text, otherwise token ids separated by spaces, in quotes."""
    context: str | None = None
    """Text or token ids that are read once as a prefix. Each prompt then queries this context."""
    task_rows: int | None = None
    """Number of rows of the run's task to answer. Each row is read up to its first query."""
    split: Literal["valid", "test"] = "test"
    """Split from which --task-rows takes its rows."""
    max_new_tokens: int | None = None
    """Number of tokens to generate; 16 by default, or the length of the task's answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a sequence."""
    temperature: float | None = None
    """Sample at this temperature instead of selecting the most likely token."""
    top_k: int | None = None
    """Sample among this number of most likely tokens."""
    top_p: float | None = None
    """Sample among the most likely tokens whose probabilities sum to this value."""
    seed: int = 0
    """Seed of the sampling. A token depends on the seed, the index of its row and its position only."""
    prefill_chunk_size: int | None = None
    """Number of prompt tokens to process at a time; all of them by default."""
    context_repetition: ContextRepetitionArguments = ContextRepetitionOptions()

    def sampling(self) -> "Sampling":
        """Return the sampling rule: greedy unless an option asks for random sampling."""
        from recallax.models.sampling import Greedy, MultinomialSampling

        if (self.temperature, self.top_k, self.top_p) == (None, None, None):
            return Greedy()
        temperature = 1.0 if self.temperature is None else self.temperature
        return MultinomialSampling(temperature=temperature, top_k=self.top_k, top_p=self.top_p)


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parse_options(GenerateOptions, arguments, "generate")
    if (options.task_rows is None) == (not options.prompt):
        raise ConfigError(
            "give either --prompt (text or token ids to continue) or --task-rows (rows of the run's task)"
        )
    if options.task_rows is not None and options.context is not None:
        raise ConfigError("--context needs --prompt; the rows of --task-rows have their own context")
    from recallax.train.inference import GenerationOptions, answer_task, continue_prompts

    generation = GenerationOptions(
        max_new_tokens=options.max_new_tokens,
        stop_token_ids=options.stop_token_ids,
        sampling=options.sampling(),
        seed=options.seed,
        prefill_chunk_size=options.prefill_chunk_size,
    )
    repetition = options.context_repetition.build()
    if options.task_rows is None:
        lines = continue_prompts(options.run, options.prompt, options.context, repetition, generation)
    else:
        lines = answer_task(options.run, options.split, options.task_rows, repetition, generation)
    print("\n".join(lines))
    return 0
