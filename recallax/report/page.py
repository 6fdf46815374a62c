"""The HTML page of a report, and the CSV and Markdown files beside it."""

import html
from collections.abc import Sequence
from pathlib import Path

from recallax.atomic_files import write_atomic
from recallax.report.figures import draw_curves, draw_group_accuracies, render_svg
from recallax.report.grouping import Setting, group_by_model, group_by_setting
from recallax.report.heatmaps import draw_heatmap, find_heatmaps, heatmap_height
from recallax.report.pareto import draw_pareto, models_with_state_bytes, pareto_caption, pareto_height
from recallax.report.runs import ReportError, RunSummary, find_run_folders, read_run, with_unique_labels
from recallax.report.tables import (
    Table,
    as_csv,
    as_html,
    as_markdown,
    config_differences,
    events_table,
    settings_table,
    summary_table,
    values_table,
)

MAX_INDIVIDUAL_RUNS = 12
"""Number of runs up to which every run has its own curves, bars and table columns."""
MAX_EVENTS = 100
"""Number of events that a page shows."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
"""Policy of the page: browsers load nothing and run no script."""
TABLE_SUFFIXES = (".csv", ".md")
"""Suffixes of the tables beside the page."""
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
    """Write a report about runs: an HTML page, and a CSV and a Markdown table with the same stem.

    An unfinished run is shown up to its last logged step.

    Args:
        runs: Folders of runs or of sweeps.
        out: HTML file to write; its folder is created.

    Raises:
        ReportError: There is no run, or `out` has the suffix of a table.
        RunFolderError: A folder is not a run's.
        LogError: A log is damaged.
        OSError: A file cannot be written.
    """
    if out.suffix in TABLE_SUFFIXES:
        raise ReportError(f"{out} has the suffix of a table beside the page; choose another one, such as .html")
    summaries = with_unique_labels([read_run(folder) for folder in find_run_folders(runs)])
    settings = group_by_setting(summaries)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, _render_page(summaries, settings))
    tables = zip(
        summary_table(summaries),
        values_table(summaries, RunSummary.group_accuracies),
        values_table(summaries, RunSummary.metrics),
        strict=True,
    )
    rows = [summary + groups[1:] + metrics[1:] for summary, groups, metrics in tables]
    write_atomic(out.with_suffix(".csv"), as_csv(rows))
    spread = "\n" + as_markdown(settings_table(settings)) if _has_several_seeds(settings) else ""
    write_atomic(out.with_suffix(".md"), as_markdown(rows) + spread)


def _render_page(runs: list[RunSummary], settings: list[Setting]) -> str:
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    parts = [f"<h1>{html.escape(title, quote=True)}</h1>"]
    summary = as_html(summary_table(runs))
    if len(runs) <= MAX_INDIVIDUAL_RUNS:
        parts.append(summary)
    parts += [
        *_seed_spread_section(settings),
        *_pareto_section(settings),
        *_heatmap_section(settings),
        *_individual_runs_section(runs, settings),
    ]
    if len(runs) > MAX_INDIVIDUAL_RUNS:
        parts += ["<h2>Runs</h2>", summary]
    parts += [*_events_section(runs), *_config_section(runs)]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title, quote=True)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _seed_spread_section(settings: list[Setting]) -> list[str]:
    """Table of settings if there are several seeds; for many settings, first a table of each model's best one."""
    if not _has_several_seeds(settings):
        return []
    parts, table = ["<h2>Spread over seeds</h2>"], as_html(settings_table(settings))
    if len(settings) <= MAX_INDIVIDUAL_RUNS:
        return [*parts, table]
    best = as_html(settings_table(_best_settings(settings)))
    parts += ["<p>The setting of each model with the best valid accuracy:</p>", best]
    return [*parts, f"<details><summary>All {len(settings)} settings</summary>{table}</details>"]


def _pareto_section(settings: list[Setting]) -> list[str]:
    models = models_with_state_bytes(settings)
    if len(models) < 2:
        return []
    figure = render_svg(pareto_caption(models), pareto_height(models), lambda figure: draw_pareto(figure, models))
    return ["<h2>Accuracy against state size</h2>", figure]


def _heatmap_section(settings: list[Setting]) -> list[str]:
    heatmaps, num_omitted = find_heatmaps(settings)
    if not heatmaps:
        return []
    figures = [
        render_svg(h.caption(), heatmap_height(h), lambda figure, h=h: draw_heatmap(figure, h)) for h in heatmaps
    ]
    note = [_render_note(f"{num_omitted} more pairs of fields are not shown.")] if num_omitted else []
    return ["<h2>Heat maps</h2>", *figures, *note]


def _individual_runs_section(runs: list[RunSummary], settings: list[Setting]) -> list[str]:
    """Curves and group accuracies; for many runs, those of each model's best setting."""
    shown, parts = runs, ["<h2>Curves</h2>"]
    if len(runs) > MAX_INDIVIDUAL_RUNS:
        best_runs = [run for setting in _best_settings(settings) for run in setting.runs]
        shown = (best_runs or runs)[:MAX_INDIVIDUAL_RUNS]
        note = f"{len(shown)} of {len(runs)} runs: those of each model's setting with the best valid accuracy."
        parts.append(_render_note(note))
    parts.append(render_svg("Training loss and valid accuracy.", 3.4, lambda figure: draw_curves(figure, shown)))
    parts.append("<h2>Accuracy by group</h2>")
    groups: Table = values_table(shown, RunSummary.group_accuracies)
    if len(groups[0]) == 1:
        return [*parts, _render_note("No run has been evaluated on the test split yet.")]
    height = 1.1 + 0.13 * (len(groups[0]) - 1) * (len(shown) + 1)
    parts.append(
        render_svg("Test accuracy by group.", height, lambda figure: draw_group_accuracies(figure, shown, groups))
    )
    parts.append(as_html(values_table(runs, RunSummary.group_accuracies)))
    metrics = values_table(runs, RunSummary.metrics)
    if len(metrics[0]) > 1:
        parts += ["<h2>Other metrics</h2>", "<p>On the test split:</p>", as_html(metrics)]
    return parts


def _events_section(runs: list[RunSummary]) -> list[str]:
    """Table of the first events of the runs, such as loss spikes."""
    header, *rows = events_table(runs)
    if not rows:
        return []
    omitted = len(rows) - MAX_EVENTS
    note = [_render_note(f"{omitted} more events are not shown.")] if omitted > 0 else []
    return ["<h2>Events</h2>", as_html([header, *rows[:MAX_EVENTS]]), *note]


def _config_section(runs: list[RunSummary]) -> list[str]:
    """Table of the fields that differ between the runs, and one of the fields that they share."""
    parts, shared, title = ["<h2>Config</h2>"], runs[0].config, "All fields"
    if len(runs) > 1:
        table = config_differences(runs)
        differing = {row[0] for row in table[1:]}
        if len(runs) > MAX_INDIVIDUAL_RUNS:
            table = [list(column) for column in zip(*table, strict=True)]  # one row per run keeps the page narrow
        parts += ["<p>Fields that differ between the runs:</p>", as_html(table)]
        shared, title = {k: v for k, v in shared.items() if k not in differing}, "Fields that all runs share"
    leaves: Table = [["field", "value"], *([k, v] for k, v in sorted(shared.items()))]
    return [*parts, f"<details><summary>{title}</summary>{as_html(leaves)}</details>"]


def _best_settings(settings: list[Setting]) -> list[Setting]:
    """Return each model's best setting, in descending order of valid accuracy."""
    best = [model.best_setting() for model in group_by_model(settings)]
    return sorted(best, key=lambda setting: -setting.mean_valid_accuracy())


def _render_note(text: str) -> str:
    return f'<p class="note">{html.escape(text, quote=True)}</p>'


def _has_several_seeds(settings: list[Setting]) -> bool:
    return any(len(setting.seeds()) > 1 for setting in settings)
