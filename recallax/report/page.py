"""The page: what it has, in which order."""

import html
from collections.abc import Sequence
from pathlib import Path

from recallax.report import heatmaps, pareto
from recallax.report.figures import draw_curves, draw_group_accuracies, render_svg
from recallax.report.grouping import Setting, group_by_model, group_by_setting
from recallax.report.heatmaps import draw_heatmap, find_heatmaps
from recallax.report.pareto import draw_pareto, models_with_state_bytes, pareto_caption
from recallax.report.runs import RunSummary, find_run_folders, read_run, with_unique_labels
from recallax.report.tables import (
    Table,
    as_csv,
    as_html,
    as_markdown,
    config_differences,
    settings_table,
    summary_table,
    values_table,
)
from recallax.train.run_folder import write_atomic

MAX_INDIVIDUAL_RUNS = 12
"""Runs up to which all have their own curves and bars, and their own columns in tables."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
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
    read = with_unique_labels([read_run(folder) for folder in find_run_folders(runs)])
    settings = group_by_setting(read)
    write_atomic(out, _render_page(read, settings))
    tables = zip(
        summary_table(read),
        values_table(read, RunSummary.group_accuracies),
        values_table(read, RunSummary.metrics),
        strict=True,
    )
    numbers = [a + b[1:] + c[1:] for a, b, c in tables]
    write_atomic(out.with_suffix(".csv"), as_csv(numbers))
    spread = "\n" + as_markdown(settings_table(settings)) if _has_several_seeds(settings) else ""
    write_atomic(out.with_suffix(".md"), as_markdown(numbers) + spread)


def _render_page(runs: list[RunSummary], settings: list[Setting]) -> str:
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{html.escape(title, quote=True)}</h1>"]
    whole = as_html(summary_table(runs))
    if len(runs) <= MAX_INDIVIDUAL_RUNS:
        parts.append(whole)
    parts += [
        *_seed_spread_section(settings),
        *_pareto_section(settings),
        *_heatmap_section(settings),
        *_individual_runs_section(runs, settings),
    ]
    if len(runs) > MAX_INDIVIDUAL_RUNS:
        parts += ["<h2>Runs</h2>", whole]
    parts += _config_section(runs)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title, quote=True)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _seed_spread_section(settings: list[Setting]) -> list[str]:
    """By setting, where there are several seeds; of many settings first the best of each model."""
    if not _has_several_seeds(settings):
        return []
    parts, whole = ["<h2>Spread over seeds</h2>"], as_html(settings_table(settings))
    if len(settings) <= MAX_INDIVIDUAL_RUNS:
        return [*parts, whole]
    best = sorted(
        (model.best_setting() for model in group_by_model(settings)), key=lambda setting: -setting.mean_valid_accuracy()
    )
    parts += ["<p>Of each model, the setting that is best on valid:</p>", as_html(settings_table(best))]
    return [*parts, f"<details><summary>All {len(settings)} settings</summary>{whole}</details>"]


def _pareto_section(settings: list[Setting]) -> list[str]:
    models = models_with_state_bytes(settings)
    if len(models) < 2:
        return []
    drawn = render_svg(pareto_caption(models), pareto.pareto_height(models), lambda figure: draw_pareto(figure, models))
    return ["<h2>Accuracy against memory</h2>", drawn]


def _heatmap_section(settings: list[Setting]) -> list[str]:
    found, more = find_heatmaps(settings)
    if not found:
        return []
    drawn = [
        render_svg(g.caption(), heatmaps.heatmap_height(g), lambda figure, g=g: draw_heatmap(figure, g)) for g in found
    ]
    return ["<h2>Grids</h2>", *drawn, *([_render_note(f"{more} more pairs of fields are not drawn.")] if more else [])]


def _individual_runs_section(runs: list[RunSummary], settings: list[Setting]) -> list[str]:
    """Curves and groups; of many runs, those of the settings that are best on valid."""
    shown, parts = runs, ["<h2>Curves</h2>"]
    if len(runs) > MAX_INDIVIDUAL_RUNS:
        best = sorted(
            (model.best_setting() for model in group_by_model(settings)),
            key=lambda setting: -setting.mean_valid_accuracy(),
        )
        shown = [run for setting in best for run in setting.runs][:MAX_INDIVIDUAL_RUNS] or runs[:MAX_INDIVIDUAL_RUNS]
        parts.append(_render_note(f"{len(shown)} of {len(runs)} runs: of each model's setting that is best on valid."))
    parts.append(render_svg("Loss and accuracy while training.", 3.4, lambda figure: draw_curves(figure, shown)))
    parts.append("<h2>Accuracy by group</h2>")
    groups: Table = values_table(shown, RunSummary.group_accuracies)
    if len(groups[0]) == 1:
        return [*parts, _render_note("No run has been evaluated on the test split yet.")]
    tall = 1.1 + 0.13 * (len(groups[0]) - 1) * (len(shown) + 1)
    parts.append(
        render_svg("Test accuracy by group.", tall, lambda figure: draw_group_accuracies(figure, shown, groups))
    )
    measures = values_table(runs, RunSummary.metrics)
    other = ["<h2>Other measures</h2>", "<p>On the test split:</p>", as_html(measures)] if len(measures[0]) > 1 else []
    return [*parts, as_html(values_table(runs, RunSummary.group_accuracies)), *other]


def _config_section(runs: list[RunSummary]) -> list[str]:
    """What differs between the runs, and, once, what they share."""
    parts, shared, told = ["<h2>Config</h2>"], runs[0].config, "The whole config"
    if len(runs) > 1:
        table = config_differences(runs)
        turned = [list(row) for row in zip(*table, strict=True)]  # runs as rows: a page scrolls better down
        parts += [
            "<p>What differs between the runs:</p>",
            as_html(turned if len(runs) > MAX_INDIVIDUAL_RUNS else table),
        ]
        differing = {row[0] for row in table[1:]}
        shared, told = {k: v for k, v in shared.items() if k not in differing}, "What all of them share"
    leaves: Table = [["field", "value"], *([k, v] for k, v in sorted(shared.items()))]
    return [*parts, f"<details><summary>{told}</summary>{as_html(leaves)}</details>"]


def _render_note(text: str) -> str:
    return f'<p class="note">{html.escape(text, quote=True)}</p>'


def _has_several_seeds(settings: list[Setting]) -> bool:
    return any(len(setting.seeds()) > 1 for setting in settings)
