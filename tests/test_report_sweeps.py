"""Reports about sweeps: grouping by seed, selection on the valid split, the Pareto front and heat maps."""

import json
import random
from itertools import combinations, product
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from recallax.cli.main import main
from recallax.report import ReportError, write_report
from recallax.report.grouping import Setting, best_setting, common_label, group_by_model, group_by_setting
from recallax.report.heatmaps import Heatmap, draw_heatmap, find_heatmaps
from recallax.report.pareto import draw_pareto, models_with_state_bytes, pareto_front
from recallax.report.runs import find_run_folders, read_run
from recallax.train.log import RunLog
from tests.test_report import HOSTILE, assert_harmless

type ModelFields = dict[str, float | str]


def make_run(
    folder: Path, model: ModelFields, *, lr: float = 0.01, seed: int = 0, valid: float, test: float, size: int = 64
) -> None:
    """Write a finished run of a model with these fields."""
    path = folder / f"{len(list(folder.glob('*')))}"
    path.mkdir(parents=True)
    config = {"schema": 1, "class": "RunConfig", "model": model, "optim": {"lr": lr}}
    config["train"] = {"steps": 20, "seed": seed, "data_seed": seed}
    (path / "config.json").write_text(json.dumps(config))
    name = " ".join(map(str, ("grid" if seed == 0 else "seeds", *model.values(), lr, seed)))
    with RunLog(path / "log.jsonl", f"{len(name):010x}") as log:
        log.write("run", 0, {"name": name, "state_bytes": size, "parameters": 9, "chance": 0.125})
        log.write("train", 20, {"loss": 1.0})
        log.write("eval", 20, {"split": "valid", "accuracy": valid})
        log.write("eval", 20, {"split": "test", "accuracy": test, "loss": 0.5, "group/all": test})


def settings(folder: Path) -> list[Setting]:
    return group_by_setting([read_run(path) for path in sorted(folder.glob("*"), key=lambda path: int(path.name))])


def test_seeds_are_grouped_and_rates_selected_on_valid(tmp_path: Path) -> None:
    for seed, (valid, test) in enumerate([(0.75, 0.5), (0.25, 0.625), (0.5, 0.75)]):
        make_run(tmp_path, {"mixer": "based"}, lr=0.02, seed=seed, valid=valid, test=test)
    make_run(
        tmp_path, {"mixer": "based"}, lr=0.01, valid=0.625, test=1.0
    )  # above the mean of three seeds, but below their seed 0
    make_run(tmp_path, {"mixer": "mom"}, valid=0.25, test=0.25, size=128)
    grouped = settings(tmp_path)
    assert [setting.label for setting in grouped] == ["based 0.02", "grid based 0.01 0", "grid mom 0.01 0"]
    assert [len(setting.seeds()) for setting in grouped] == [3, 1, 1]
    assert grouped[0].test_accuracies() == [0.5, 0.625, 0.75] and grouped[0].mean_valid_accuracy() == 0.5
    models = group_by_model(grouped)
    assert [(model.label, model.best_setting().label) for model in models] == [
        ("based", "based 0.02"),
        ("grid mom 0.01 0",) * 2,
    ]
    write_report(sorted(tmp_path.glob("[0-9]")), tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert_harmless(page)
    assert "<td>based 0.02</td><td>64</td><td>3</td><td>0.5</td><td>0.625</td><td>0.5</td><td>0.75</td>" in page
    assert "based (3)" in page and "grid mom 0.01 0 (1)" in page and "the lowest seed to the highest" in page
    assert "| based 0.02 | 64 | 3 | 0.5 | 0.625 | 0.5 | 0.75 |" in (tmp_path / "out.md").read_text()


def test_among_equal_settings_the_one_with_most_seeds_is_best(tmp_path: Path) -> None:
    make_run(tmp_path, {"mixer": "based"}, lr=0.01, valid=1.0, test=0.5)
    for seed in (0, 1):
        make_run(tmp_path, {"mixer": "based"}, lr=0.02, seed=seed, valid=1.0, test=0.5)
    assert best_setting(settings(tmp_path)).label == "based 0.02"


def test_common_label_and_unique_setting_labels(tmp_path: Path) -> None:
    assert common_label(["a b 1", "c b 2"]) == "b" and common_label(["a", "b"]) == "a"
    for width, lr in product((16, 32), (0.1, 0.2)):
        make_run(tmp_path, {"d_model": width}, lr=lr, valid=0.5, test=0.5)
    for log in tmp_path.glob("*/log.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows[0]["name"] = "mqar_based"  # the name that `recallax train` gives to all of them
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [setting.label for setting in settings(tmp_path)] == [
        f"mqar_based d_model={width} lr={lr}" for width, lr in product((16, 32), (0.1, 0.2))
    ]
    assert [model.label for model in group_by_model(settings(tmp_path))] == [
        "mqar_based d_model=16",
        "mqar_based d_model=32",
    ]


def test_pareto_front(tmp_path: Path) -> None:
    places = [(64, 0.5), (64, 0.25), (128, 0.5), (256, 0.75), (512, 0.625), (1024, 1.0)]
    for i, (size, accuracy) in enumerate(places):
        make_run(tmp_path, {"mixer": f"m{i}"}, valid=accuracy, test=accuracy, size=size)
    front = pareto_front([model.best_setting() for model in models_with_state_bytes(settings(tmp_path))])
    assert [(setting.state_bytes(), setting.test_accuracies()[0]) for setting in front] == [
        (64, 0.5),
        (256, 0.75),
        (1024, 1.0),
    ]


def test_find_heatmaps_of_independent_fields(tmp_path: Path) -> None:
    """Two fields vary independently, and a third one varies together with one of them."""
    for lr, width, seed in product((0.1, 0.02, 0.004), (8, 16), (0, 1)):
        accuracy = (width / 16) * (0.5 if lr == 0.1 else 0.75) + seed / 8
        make_run(tmp_path, {"d_model": width, "inner": 2 * width}, lr=lr, seed=seed, valid=accuracy, test=accuracy)
    ((heatmap,), num_omitted) = find_heatmaps(settings(tmp_path))
    assert num_omitted == 0 and (heatmap.x_axis.name, heatmap.y_axis.name) == ("optim.lr", "model.d_model")
    assert (
        heatmap.y_axis.tied_fields == ("model.inner",)
        and "model.d_model varies together with model.inner." in heatmap.caption()
    )
    assert heatmap.x_axis.ticks() == ["0.004", "0.02", "0.1"] and heatmap.y_axis.ticks() == ["8", "16"]
    assert {cell: (len(group), group[0].test_accuracies()) for cell, group in heatmap.cells.items()} == {
        (lr, width): (1, [low, low + 0.125])
        for (lr, width), low in {
            ("0.1", "8"): 0.25,
            ("0.02", "8"): 0.375,
            ("0.004", "8"): 0.375,
            ("0.1", "16"): 0.5,
            ("0.02", "16"): 0.75,
            ("0.004", "16"): 0.75,
        }.items()
    }
    assert {"0.812", "0.750 to 0.875", "0.004", "optim.lr", "model.d_model"} <= set(texts_of(heatmap))


def test_a_heatmap_cell_shows_the_setting_that_is_best_on_valid(tmp_path: Path) -> None:
    for lr, width, layers in product((0.1, 0.2), (8, 16), (1, 2)):
        model: ModelFields = {"d_model": width, "layers": layers}
        make_run(tmp_path, model, lr=lr, valid=0.25 * layers, test=0.25 + 0.5 * (layers == 2) * (width == 8))
    heatmaps, num_omitted = find_heatmaps(settings(tmp_path))
    names = [(heatmap.x_axis.name, heatmap.y_axis.name) for heatmap in heatmaps]
    assert names[0] == ("optim.lr", "model") and num_omitted == 0, "first the heat map with one setting per cell"
    assert set(names[1:]) == {
        ("optim.lr", "model.d_model"),
        ("optim.lr", "model.layers"),
        ("model.d_model", "model.layers"),
    }
    heatmap = heatmaps[names.index(("optim.lr", "model.d_model"))]
    assert "Where several settings share a cell" in heatmap.caption()
    assert (
        sorted(text for text in texts_of(heatmap) if text.startswith("0.") and len(text) == 5)
        == ["0.250"] * 2 + ["0.750"] * 2
    )


def test_no_heatmap_of_fields_that_vary_together(tmp_path: Path) -> None:
    for i in range(4):
        make_run(tmp_path, {"d_model": 8 * 2**i}, lr=0.1 / 2**i, valid=0.5, test=0.5)
    make_run(tmp_path, {"d_model": 8}, lr=0.05, valid=0.5, test=0.5)
    assert find_heatmaps(settings(tmp_path)) == ([], 0), "five of sixteen pairs are too few"


def test_figure_labels_do_not_overlap(tmp_path: Path) -> None:
    """Fifteen models, some with nearly equal points. The boxes are those of the rendered text."""
    random.seed(0)
    for i in range(15):
        size, accuracy = 1024 * 2 ** (i % 3 + random.random() / 4), 0.9 + random.random() / 10
        make_run(tmp_path, {"mixer": f"a mixer called {i}"}, valid=accuracy, test=accuracy, size=int(size))
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, 4.9), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw_pareto(figure, models_with_state_bytes(settings(tmp_path)))
    canvas.draw()
    labels = [text for text in figure.axes[0].texts if "mixer" in text.get_text()]
    boxes = [
        Text.get_window_extent(text, canvas.get_renderer()).shrunk(1, 0.8) for text in labels
    ]  # shrunk: the extent includes the connecting lines
    overlapping = [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]
    assert len(boxes) == 15 and not overlapping
    inside = figure.axes[0].get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 + 1 for box in boxes)


def test_report_summarizes_large_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    for lr, width in product((0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4), (8, 16)):
        make_run(out, {"d_model": width}, lr=lr, valid=lr / 8, test=lr / 8, size=4 * width)
    with pytest.raises(ReportError, match="a sweep that has run folders"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "results.jsonl").touch()
        find_run_folders([tmp_path / "empty"])
    (out / "results.jsonl").touch()
    assert main(["report", str(out), "--out", str(tmp_path / "out.html")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert assert_harmless(page).tags.count("svg") == 4, "Pareto front, one heat map, curves, groups"
    assert "2 of 14 runs" in page and "its other settings are the small grey points" in page
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 15
    assert page.count("<details>") == 1 and "Fields that all runs share" in page


def test_hostile_values_on_the_axes_are_escaped(tmp_path: Path) -> None:
    for i, value in enumerate(HOSTILE[:6]):
        for lr in (0.1, 0.2):
            make_run(tmp_path / "runs", {"note": value}, lr=lr, valid=0.5, test=i / 8, size=64 + i)
    write_report(list((tmp_path / "runs").glob("*")), tmp_path / "out.html")
    texts = assert_harmless((tmp_path / "out.html").read_text()).texts
    assert any("<script>" in text for text in texts) and "optim.lr" in texts


def texts_of(heatmap: Heatmap) -> list[str]:
    figure = Figure()
    draw_heatmap(figure, heatmap)
    ax = figure.axes[0]
    ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
    return [*(text.get_text() for text in [*ax.texts, *ticks]), ax.get_xlabel(), ax.get_title(loc="left")]
