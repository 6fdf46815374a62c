"""The page: what it has, in which order."""

import html
from collections.abc import Sequence
from pathlib import Path

from recallax.train.report import grids, pareto
from recallax.train.report.figures import as_svg, draw_curves, draw_groups
from recallax.train.report.grids import draw_grid, grids_of
from recallax.train.report.pareto import caption, draw_memory, placed
from recallax.train.report.runs import Run, folders_of, read_run, tell_apart
from recallax.train.report.settings import Setting, models_of, settings_of
from recallax.train.report.tables import (
    Table,
    as_csv,
    as_html,
    as_markdown,
    by_name,
    by_setting,
    differences,
    summary,
)
from recallax.train.run_folder import write_atomic

SINGLE = 12
"""Runs up to which all have their own curves and bars, and their own columns in tables."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.wide { overflow-x: auto } figure { margin: 1rem 0 } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
figcaption, .note { color: #555 } summary { cursor: pointer }
"""


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write `out` (HTML) and, with the same stem, `.csv` and `.md`, from the folders of runs, or of sweeps.

    A run that is not finished is shown as far as it got. Raises ReportError without runs, RunFolderError for a
    folder that is not a run's, LogError for a damaged log, OSError if a file cannot be written.
    """
    read = tell_apart([read_run(folder) for folder in folders_of(runs)])
    settings = settings_of(read)
    write_atomic(out, _page(read, settings))
    tables = zip(summary(read), by_name(read, Run.groups), by_name(read, Run.measures), strict=True)
    numbers = [a + b[1:] + c[1:] for a, b, c in tables]
    write_atomic(out.with_suffix(".csv"), as_csv(numbers))
    spread = "\n" + as_markdown(by_setting(settings)) if _several_seeds(settings) else ""
    write_atomic(out.with_suffix(".md"), as_markdown(numbers) + spread)


def _page(runs: list[Run], settings: list[Setting]) -> str:
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{html.escape(title, quote=True)}</h1>"]
    whole = as_html(summary(runs))
    if len(runs) <= SINGLE:
        parts.append(whole)
    parts += [*_spread(settings), *_memory(settings), *_heat_maps(settings), *_singly(runs, settings)]
    if len(runs) > SINGLE:
        parts += ["<h2>Runs</h2>", whole]
    parts += _configs(runs)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title, quote=True)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _spread(settings: list[Setting]) -> list[str]:
    """By setting, where there are several seeds; of many settings first the best of each model."""
    if not _several_seeds(settings):
        return []
    parts, whole = ["<h2>Spread over seeds</h2>"], as_html(by_setting(settings))
    if len(settings) <= SINGLE:
        return [*parts, whole]
    best = sorted((model.best() for model in models_of(settings)), key=lambda setting: -setting.valid())
    parts += ["<p>Of each model, the setting that is best on valid:</p>", as_html(by_setting(best))]
    return [*parts, f"<details><summary>All {len(settings)} settings</summary>{whole}</details>"]


def _memory(settings: list[Setting]) -> list[str]:
    models = placed(settings)
    if len(models) < 2:
        return []
    drawn = as_svg(caption(models), pareto.height(models), lambda figure: draw_memory(figure, models))
    return ["<h2>Accuracy against memory</h2>", drawn]


def _heat_maps(settings: list[Setting]) -> list[str]:
    found, more = grids_of(settings)
    if not found:
        return []
    drawn = [as_svg(g.caption(), grids.height(g), lambda figure, g=g: draw_grid(figure, g)) for g in found]
    return ["<h2>Grids</h2>", *drawn, *([_note(f"{more} more pairs of fields are not drawn.")] if more else [])]


def _singly(runs: list[Run], settings: list[Setting]) -> list[str]:
    """Curves and groups; of many runs, those of the settings that are best on valid."""
    shown, parts = runs, ["<h2>Curves</h2>"]
    if len(runs) > SINGLE:
        best = sorted((model.best() for model in models_of(settings)), key=lambda setting: -setting.valid())
        shown = [run for setting in best for run in setting.runs][:SINGLE] or runs[:SINGLE]
        parts.append(_note(f"{len(shown)} of {len(runs)} runs: of each model's setting that is best on valid."))
    parts.append(as_svg("Loss and accuracy while training.", 3.4, lambda figure: draw_curves(figure, shown)))
    parts.append("<h2>Accuracy by group</h2>")
    groups: Table = by_name(shown, Run.groups)
    if len(groups[0]) == 1:
        return [*parts, _note("No run has been evaluated on the test split yet.")]
    tall = 1.1 + 0.13 * (len(groups[0]) - 1) * (len(shown) + 1)
    parts.append(as_svg("Test accuracy by group.", tall, lambda figure: draw_groups(figure, shown, groups)))
    measures = by_name(runs, Run.measures)
    other = ["<h2>Other measures</h2>", "<p>On the test split:</p>", as_html(measures)] if len(measures[0]) > 1 else []
    return [*parts, as_html(by_name(runs, Run.groups)), *other]


def _configs(runs: list[Run]) -> list[str]:
    """What differs between the runs, and, once, what they share."""
    parts, shared, told = ["<h2>Config</h2>"], runs[0].config, "The whole config"
    if len(runs) > 1:
        table = differences(runs)
        turned = [list(row) for row in zip(*table, strict=True)]  # runs as rows: a page scrolls better down
        parts += ["<p>What differs between the runs:</p>", as_html(turned if len(runs) > SINGLE else table)]
        differing = {row[0] for row in table[1:]}
        shared, told = {k: v for k, v in shared.items() if k not in differing}, "What all of them share"
    leaves: Table = [["field", "value"], *([k, v] for k, v in sorted(shared.items()))]
    return [*parts, f"<details><summary>{told}</summary>{as_html(leaves)}</details>"]


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text, quote=True)}</p>'


def _several_seeds(settings: list[Setting]) -> bool:
    return any(len(setting.seeds()) > 1 for setting in settings)
