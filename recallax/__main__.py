"""The command line: `recallax list`, `show`, `train`, `eval`, `generate`, `calibrate`, `sweep`, `export`, ...

Only what a command needs is imported: `--help` and `list` read the configs' docstrings and import no JAX.
"""

import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from recallax import __version__
from recallax.config import ConfigError, suggest_name

if TYPE_CHECKING:
    from recallax.train.run_config import RunConfig

CONFIG_DIR = Path(__file__).parent / "configs"
EXIT_PREEMPTED = 75
"""Exit status of a run that was asked to stop and can go on (EX_TEMPFAIL: try again)."""
EXIT_INTERRUPTED = 130
"""Exit status of what Ctrl-C stopped at once: nothing was there to save yet, or it came a second time."""
EXIT_BROKEN_PIPE = 141
"""Exit status of what wrote into a pipe that nobody reads any more, as a shell gives it."""

USAGE = f"""recallax {__version__}: sequence models that recall well with little memory

  recallax list                        the configs there are
  recallax show CONFIG [overrides]     what a config resolves to, its parameters, state bytes and FLOPs
  recallax train CONFIG [overrides]    train it, or go on where its run stopped
  recallax eval RUN                    evaluate a run's newest checkpoint
  recallax generate RUN --prompt TEXT  let a run's newest checkpoint go on from text or token ids, or answer its task
  recallax calibrate RUN --context N   a run of the same weights that reads longer contexts (LongMamba)
  recallax corpus CONFIG               fetch and tokenize the text of a config, and say how much there is
  recallax tokenizer CONFIG --out FILE train a BPE tokenizer on the text of a config
  recallax sweep FILE                  train what a Python file asks for, and list what the runs came to
  recallax export RUN --to FORM        its weights for other programs: safetensors, stablehlo or orbax
  recallax import PATH                 a run of weights: an export, or a published model in safetensors
  recallax report RUN...               one HTML page, a CSV and a Markdown table about runs
  recallax doctor                      what this machine has, and which implementation each op takes on it

`recallax COMMAND --help` says more; `recallax train CONFIG --help` lists everything that can be overridden.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 for a failed run, 2 for wrong input, 75 for a run that can go on."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        return _exit_with_error(f"there is no command {name!r}{suggest_name(name, list(COMMANDS))}", 2)
    try:
        status = COMMANDS[name](rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # what read it has seen enough: `recallax list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def config_names() -> dict[str, str]:
    """Every config by name, with the first line of its docstring."""
    files = sorted(path for path in CONFIG_DIR.glob("*.py") if path.stem != "__init__")
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0] for path in files}


def load_config(name: str) -> "RunConfig":
    """The config of that name. Raises ConfigError with the nearest name."""
    known = list(config_names())
    if name not in known:
        raise ConfigError(f"there is no config {name!r}{suggest_name(name, known)}")
    return importlib.import_module(f"recallax.configs.{name}").get_config()


def _parse_overrides[T](default: T, arguments: list[str], prog: str) -> T:
    """The value with the leaves that the command line names."""
    import tyro

    # What may be None, such as a curriculum, would otherwise hide behind a subcommand.
    flat = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(type(default), default=default, args=arguments, prog=prog, config=flat)


def _list_configs(arguments: list[str]) -> int:
    if arguments:
        print("usage: recallax list\n\nThe configs there are, with the question each one asks.")
        return 0 if arguments[0] in ("-h", "--help") else 2
    names = config_names()
    width = max(map(len, names))
    for name, line in names.items():
        print(f"{name:{width}}  {line}")
    return 0


def _show_config(arguments: list[str]) -> int:
    def run(name: str) -> int:
        config = load_config(name)

        from recallax.cli.show import describe_config

        config = _parse_overrides(config, arguments[1:], f"recallax show {name}")
        print(describe_config(name, config))
        return 0

    return _run_with_config("show", arguments, run)


def _train(arguments: list[str]) -> int:
    def run(name: str) -> int:
        config = load_config(name)
        import tyro

        from recallax.train.distributed import Distributed
        from recallax.train.loop import train
        from recallax.train.metrics_logger import NonFiniteError
        from recallax.train.run_config import RunConfig
        from recallax.train.run_folder import run_folder_name
        from recallax.train.stop_signals import Interrupted

        @dataclass(frozen=True, kw_only=True)
        class Train:
            config: Annotated[RunConfig, tyro.conf.arg(name="")]
            run: Path | None = None
            """Folder of the run; runs/CONFIG-FINGERPRINT by default. An unfinished run there is continued."""
            profile: bool = False
            """Trace a few steps into the run's folder and report the model FLOPs utilisation."""
            distributed: Distributed = field(default_factory=Distributed)

        parsed = _parse_overrides(Train(config=config), arguments[1:], f"recallax train {name}")
        parsed.distributed.initialize()
        folder = parsed.run or Path("runs") / run_folder_name(name, parsed.config)
        try:
            train(parsed.config, folder, name=name, profile=parsed.profile)
        except Interrupted as stop:
            print(f"recallax: {stop}", file=sys.stderr)
            return EXIT_PREEMPTED
        except NonFiniteError as error:
            return _exit_with_error(str(error), 1)
        print(f"run: {folder}\nreport: recallax report {folder}")
        return 0

    return _run_with_config("train", arguments, run)


def _eval(arguments: list[str]) -> int:
    import tyro

    def evaluate(
        run: tyro.conf.Positional[Path],
        split: Literal["valid", "test"] = "test",
        batches: int | None = None,
        repeat: int = 1,
        fill: Literal["left_pad", "twice", "iterate"] = "left_pad",
        prefix: int | None = None,
    ) -> int:
        """Evaluate a run's newest checkpoint.

        Args:
            run: Folder of the run.
            split: Which stream of the task.
            batches: Batches to read; the config's number by default.
            repeat: Times that the context of a row is read before the questions (2 is JRT-Prompt).
            fill: What brings a context that is shorter than --prefix nearer to it.
            prefix: Tokens of context that the run was trained with.
        """
        from recallax.tasks import ContextRepetition
        from recallax.train.loop import evaluate_run

        reread = ContextRepetition(num_repeats=repeat, fill_strategy=fill, prefix_length=prefix)
        for name, value in evaluate_run(run, split, batches, reread.apply_to_task).items():
            print(f"{name:24} {value:.4f}")
        return 0

    return _exit_on_user_error(lambda: tyro.cli(evaluate, args=arguments, prog="recallax eval"))


def _generate(arguments: list[str]) -> int:
    import tyro

    def generate(
        run: tyro.conf.Positional[Path],
        prompt: tuple[str, ...] = (),
        context: str | None = None,
        task: int | None = None,
        split: Literal["valid", "test"] = "test",
        new: int | None = None,
        stop: tuple[int, ...] = (),
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        piece: int | None = None,
        repeat: int = 1,
        fill: Literal["left_pad", "twice", "iterate"] = "left_pad",
        prefix: int | None = None,
    ) -> int:
        """Let a run's newest checkpoint go on from prompts, or answer questions of its own task.

        Args:
            run: Folder of the run.
            prompt: Text for a run on text, else token ids separated by spaces, in quotes. Several are read together,
                and what is written behind each comes out in turn.
            context: Text or token ids that are read once, as a prefix, and then asked each prompt.
            task: Draw this many rows of the run's task instead, read each up to its first question, and show what the
                model answers beside what was wanted.
            split: Which stream of the task.
            new: Tokens to add; 16, or as many as the task's answer has.
            stop: Token ids that end a row.
            temperature: Draw tokens at this temperature instead of taking the likeliest.
            top_k: Draw among that many likeliest ids.
            top_p: Draw among the likeliest ids that have this probability together.
            seed: What is drawn is a function of it, of the row's number and of the position.
            piece: Read prompts that many tokens at a time.
            repeat: Times that the context is read before the questions (2 is JRT-Prompt).
            fill: What brings a context that is shorter than --prefix nearer to it.
            prefix: Tokens of context that the run was trained with.
        """
        from recallax.models.sampling import Greedy, MultinomialSampling
        from recallax.tasks import ContextRepetition
        from recallax.train.inference import GenerationOptions, answer_task, continue_prompts

        sampling = Greedy()
        if (temperature, top_k, top_p) != (None, None, None):
            sampling = MultinomialSampling(
                temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=top_p
            )
        writing = GenerationOptions(
            max_new_tokens=new, stop_token_ids=stop, sampling=sampling, seed=seed, prefill_chunk_size=piece
        )
        reread = ContextRepetition(num_repeats=repeat, fill_strategy=fill, prefix_length=prefix)
        if (task is None) == (not prompt):
            raise ConfigError(
                "give either --prompt, token ids to go on from, or --task, a number of the task's own rows"
            )
        if task is None:
            lines = continue_prompts(run, prompt, context, reread, writing)
        elif context is not None:
            raise ConfigError("--context goes with --prompt; the rows of --task have a context of their own")
        else:
            lines = answer_task(run, split, task, reread, writing)
        print("\n".join(lines))
        return 0

    return _exit_on_user_error(lambda: tyro.cli(generate, args=arguments, prog="recallax generate"))


def _corpus(arguments: list[str]) -> int:
    def run(name: str) -> int:
        config = load_config(name)
        import tyro

        from recallax.cli.corpus import describe_corpus
        from recallax.train.run_config import RunConfig

        @dataclass(frozen=True, kw_only=True)
        class Corpus:
            config: Annotated[RunConfig, tyro.conf.arg(name="")]
            download: bool = False
            """Fetch the corpus and prepare it (TFDS: as array_record), where it is not there yet."""

        parsed = _parse_overrides(Corpus(config=config), arguments[1:], f"recallax corpus {name}")
        print(describe_corpus(parsed.config, download=parsed.download))
        return 0

    return _run_with_config("corpus", arguments, run)


def _tokenizer(arguments: list[str]) -> int:
    def run(name: str) -> int:
        config = load_config(name)
        import tyro

        from recallax.cli.corpus import train_tokenizer
        from recallax.train.run_config import RunConfig

        @dataclass(frozen=True, kw_only=True)
        class Tokenizer:
            config: Annotated[RunConfig, tyro.conf.arg(name="")]
            out: Path = Path("tokenizer.json")
            """The file to write; name it as the file of a BPE tokenizer in a config."""
            ids: int = 8192
            """Token ids at most, the 256 bytes and the boundary among them."""
            download: bool = False
            """Fetch the corpus and prepare it (TFDS: as array_record), where it is not there yet."""

        parsed = _parse_overrides(Tokenizer(config=config), arguments[1:], f"recallax tokenizer {name}")
        print(train_tokenizer(parsed.config, parsed.out, parsed.ids, download=parsed.download))
        return 0

    return _run_with_config("tokenizer", arguments, run)


def _calibrate(arguments: list[str]) -> int:
    import tyro

    def calibrate(
        run: tyro.conf.Positional[Path],
        context: int,
        length: int | None = None,
        rows: int = 32,
        keeps: float = 0.05,
        outliers: float = 0.95,
        out: Path | None = None,
    ) -> int:
        """Make a run that reads a longer context than a run was trained on, without training: LongMamba's filters.

        Its folder is a run like any other: eval, generate and export take it.

        Args:
            run: Folder of the run; its model has Mamba2 or DiagonalSSM layers.
            context: Tokens that the new run is to read. Not above --length, nothing is filtered.
            length: Tokens of the rows it was trained on; the longest train length of its task by default.
            rows: Rows of that length, of the valid split, from which thresholds are found.
            keeps: Share of its state that a channel must keep over that length to be filtered.
            outliers: Quantile at which step sizes are cut before that is decided.
            out: Folder of the new run; RUN/long-CONTEXT by default.
        """
        from recallax.train.calibration import CalibrationOptions, calibrate_run

        wanted = CalibrationOptions(
            context_length=context, train_length=length, num_rows=rows, min_retention=keeps, clip_quantile=outliers
        )
        folder, told = calibrate_run(run, wanted, out)
        print("\n".join(told))
        print(f"run: {folder}\nevaluate: recallax eval {folder}")
        return 0

    return _exit_on_user_error(lambda: tyro.cli(calibrate, args=arguments, prog="recallax calibrate"))


def _sweep(arguments: list[str]) -> int:
    import tyro

    def run(
        file: tyro.conf.Positional[Path],
        out: Path | None = None,
        backend: Literal["local", "ray", "slurm"] = "local",
        workers: int | None = None,
        retries: int = 1,
        vmap_seeds: int = 1,
        address: str | None = None,
        cpus: int | None = None,
        gpus: float | None = None,
        memory: float | None = None,
        partition: str | None = None,
        minutes: int | None = None,
        extra: tuple[str, ...] = (),
    ) -> int:
        """Train what a Python file asks for, a run folder each, and list what they came to.

        The same command goes on where a sweep stopped: finished runs are skipped, unfinished ones continued.

        Args:
            file: Python file with `NUM_KEY_STAGES`, functions from rows to cells (`recallax/sweep/runner.py`).
            out: Folder of the runs and of results.jsonl; runs/FOLDER-OF-THE-FILE by default.
            backend: Processes of this machine, tasks of a Ray cluster, or jobs of SLURM; a cluster shares OUT.
            workers: Runs at a time: one per accelerator, or one per core; on a cluster, 64 of them in its queue.
            retries: Times that a run which failed is tried again; one that was asked to stop has not failed.
            vmap_seeds: Seeds of one config that one process trains at once on one device, under jax.vmap.
            address: Of ray: the cluster; RAY_ADDRESS, or else one that is started here, by default.
            cpus: Of ray and slurm: cores of each run; 1 by default.
            gpus: Of ray and slurm: accelerators of each run; on ray 1 by default if there is one, on slurm 0.
            memory: Of slurm: GiB of each run.
            partition: Of slurm: where jobs queue.
            minutes: Of slurm: wall time, after which a run saves and queues again; 60 by default.
            extra: Of slurm: further options of sbatch, as in `--extra account=ours constraint=h100`.
        """
        from recallax.sweep.backends.factory import ResourceOptions, make_backend
        from recallax.sweep.runner import sweep

        folder = out or Path("runs") / file.absolute().parent.name
        asked = ResourceOptions(
            address=address,
            cpus=cpus,
            gpus=gpus,
            memory=memory,
            partition=partition,
            minutes=minutes,
            extra=extra or None,
        )
        with contextlib.closing(make_backend(backend, workers, asked, folder)) as chosen:
            failed = sweep(file, folder, chosen, retries=retries, vmap_seeds=vmap_seeds)
        print(f"rows: {folder / 'results.jsonl'}")
        return min(failed, 1)

    return _exit_on_user_error(lambda: tyro.cli(run, args=arguments, prog="recallax sweep"))


def _export(arguments: list[str]) -> int:
    import tyro

    def export(
        run: tyro.conf.Positional[Path],
        to: Literal["safetensors", "stablehlo", "orbax"],
        out: Path | None = None,
        layout: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        shard_gb: float | None = None,
        length: int = 64,
        context: int = 1024,
    ) -> int:
        """Write a run's newest checkpoint as other programs read it.

        Args:
            run: Folder of the run.
            to: safetensors with a config.json; stablehlo, compiled programs of prefill and step; or orbax.
            out: The folder to make; RUN/export-FORM by default.
            layout: Of safetensors: whose names the weights get (docs/commands/export.md lists the layouts), or recallax
                for its own; by default the one that the run was imported from, else the first that has this model.
            dtype: Of safetensors and orbax; by default that of the import, else float32.
            shard_gb: Of safetensors: 10^9 bytes that one file holds at most, with an index where there are several; by
                default 50, as in transformers.
            length: Of stablehlo: tokens that one call of prefill takes at most.
            context: Of stablehlo: tokens that the state has room for.
        """
        folder = out or run / f"export-{to}"
        if to == "stablehlo":
            if (layout, dtype, shard_gb) != (None, None, None):
                raise ConfigError("--layout, --dtype and --shard-gb go with weights; programs have those of the run")
            from recallax.convert.stablehlo import export_programs

            export_programs(run, folder, prefill_length=length, max_len=context)
            print(f"stablehlo: {folder}")
            return 0
        from recallax.convert.run_conversion import export_run

        kind = export_run(run, to, folder, layout=layout, dtype=dtype, shard_gb=shard_gb)
        print(f"{to}: {folder}\nlayout: {kind}")
        return 0

    return _exit_on_user_error(lambda: tyro.cli(export, args=arguments, prog="recallax export"))


def _import_weights(arguments: list[str]) -> int:
    import tyro

    def bring(path: tyro.conf.Positional[Path], run: Path | None = None, config: str = "mqar_micro") -> int:
        """Make a run of exported or published weights, which train, eval and export then open.

        Args:
            path: Folder with config.json and *.safetensors, or what `export --to orbax` made.
            run: Folder of the new run; runs/imported_LAYOUT-FINGERPRINT by default.
            config: Whose task, optimizer and schedule a published model gets; recallax's own layout brings its own.
        """
        base = load_config(config)
        from recallax.convert.run_conversion import import_run

        print(f"run: {import_run(path, base, run)}")
        return 0

    return _exit_on_user_error(lambda: tyro.cli(bring, args=arguments, prog="recallax import"))


def _report(arguments: list[str]) -> int:
    import tyro

    def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("report.html")) -> int:
        """Write one self-contained HTML page about one or more runs, a CSV and a Markdown table beside it.

        Args:
            runs: Folders of the runs.
            out: The HTML file.
        """
        from recallax.report import write_report

        write_report(list(runs), out)
        print(f"report: {out}")
        return 0

    return _exit_on_user_error(lambda: tyro.cli(report, args=arguments, prog="recallax report"))


def _doctor(arguments: list[str]) -> int:
    if arguments:
        print("usage: recallax doctor\n\nVersions, devices, extras, and which implementation each op takes here.")
        return 0 if arguments[0] in ("-h", "--help") else 2
    from recallax.cli.doctor import describe_machine

    print(describe_machine())
    return 0


def _run_with_config(command: str, arguments: list[str], run: Callable[[str], int]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(f"usage: recallax {command} CONFIG [overrides]\n\nconfigs: {', '.join(config_names())}")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    return _exit_on_user_error(lambda: run(arguments[0]))


def _exit_on_user_error(run: Callable[[], int]) -> int:
    """Turn the errors that a user can cause into one line; anything else is a defect and keeps its traceback."""
    try:
        return run()
    except KeyboardInterrupt:
        return _exit_with_error("stopped at once", EXIT_INTERRUPTED)
    except ConfigError as error:
        return _exit_with_error(str(error), 2)
    except Exception as error:
        from recallax.cli.errors import USER_ERRORS

        if isinstance(error, USER_ERRORS):
            return _exit_with_error(str(error), 2)
        raise


def _exit_with_error(message: str, status: int) -> int:
    print(f"recallax: {message}", file=sys.stderr)
    return status


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "list": _list_configs,
    "show": _show_config,
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "corpus": _corpus,
    "tokenizer": _tokenizer,
    "calibrate": _calibrate,
    "sweep": _sweep,
    "export": _export,
    "import": _import_weights,
    "report": _report,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
