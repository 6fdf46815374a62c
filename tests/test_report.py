"""Reports need no network, run no script, show the numbers, and escape every string."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recallax.external_file import printable
from recallax.report import ReportError, write_report
from recallax.train.log import LogError, RunLog
from recallax.train.run_folder import RunFolderError

HOSTILE = (
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "--><script>alert(1)</script><!--",
    "]]><script>alert(1)</script>",
    "<a href=javascript:alert(1)>x</a>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "&lt;script&gt;$\\frac{1}{$ \x1b]0;x\x07",
    "=HYPERLINK(\"https://evil.example\")|[x](javascript:alert(1))",
    "\u202e_\u4e00 <iframe src=//evil.example>\n</svg><object data=x>",
)  # fmt: skip


class Page(HTMLParser):
    """Parser that collects the elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def make_run(folder: Path, name: str, *, size: int = 4096, accuracy: float = 0.875, tested: bool = True) -> Path:
    folder.mkdir(parents=True)
    config = {"schema": 1, "class": "RunConfig", "model": {"d_model": size, "note": name}, "train": {"steps": 20}}
    (folder / "config.json").write_text(json.dumps(config))
    with RunLog(folder / "log.jsonl", f"{size:010x}") as log:
        info = {
            "name": name,
            "state_bytes": size,
            "parameters": 12345,
            "chance": 0.125,
            "device": name,
            "commit": name,
        }
        log.write("run", 0, info)
        for step in (10, 20):
            log.write("train", step, {"loss": 20 / step})
            log.write("eval", step, {"split": "valid", "accuracy": accuracy * step / 20})
        if tested:
            groups = {"group/near": accuracy, f"group/{name}": 0.1234}
            log.write("eval", 20, {"split": "test", "accuracy": accuracy, "loss": 0.625, **groups})
    return folder


def assert_harmless(page: str) -> Page:
    parsed = Page(page)
    banned = {"script", "iframe", "object", "embed", "link", "base", "form", "img", "a", "image", "foreignobject"}
    assert not banned & set(parsed.tags)
    for name, value in parsed.attributes:
        assert not name.startswith("on"), f"{name}={value}"
        assert "javascript:" not in value.lower() and "//" not in value, f"{name}={value}"
        assert "href" not in name or value.startswith("#")
    for style in re.findall(r"(?s)<style[^>]*>(.*?)</style>", page):
        assert "import" not in style and "url(" not in style.replace("url(#", "")
    assert ("http-equiv", "Content-Security-Policy") in parsed.attributes
    assert any(value.startswith("default-src 'none'") for _, value in parsed.attributes)
    return parsed


def test_one_run_shows_its_numbers(tmp_path: Path) -> None:
    write_report([make_run(tmp_path / "a", "based")], tmp_path / "out.html")
    parsed = assert_harmless((tmp_path / "out.html").read_text())
    texts = [text.strip() for text in parsed.texts]
    for expected in ("based", "finished", "0.875", "0.625", "4,096", "12,345", "0.1234", "near", "train.steps"):
        assert expected in texts
    for axis in ("optimizer step", "training loss (nats)", "valid accuracy (fraction)", "test accuracy (fraction)"):
        assert axis in texts
    assert parsed.tags.count("svg") == 2, "curves and groups; the Pareto figure needs two models"
    (row,) = csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))
    assert row["run"] == "based" and float(row["test accuracy"]) == 0.875 and row["state bytes"] == "4096"
    assert "| based | finished | 0.875 |" in (tmp_path / "out.md").read_text()


def test_several_runs_are_compared(tmp_path: Path) -> None:
    sizes = {"based": 1024, "mom": 65536, "attention": 1 << 20}
    runs = [make_run(tmp_path / name, name, size=size) for name, size in sizes.items()]
    write_report(runs, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    parsed = assert_harmless(page)
    assert parsed.tags.count("svg") == 3
    texts = [text.strip() for text in parsed.texts]
    assert {"state (bytes per sequence, log scale)", "64 KiB", "1 MiB", *sizes} <= set(texts)
    differing = page[page.index("Fields that differ between") : page.index("<details>")]
    assert "model.d_model" in differing and "65536" in differing and "train.steps" not in differing
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 4


def test_runs_with_equal_names_get_unique_labels(tmp_path: Path) -> None:
    sizes = {"a": 16, "b": 32, "c": 32}
    write_report([make_run(tmp_path / k, "based", size=v) for k, v in sizes.items()], tmp_path / "out.html")
    rows = csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))
    assert [row["run"] for row in rows] == ["based 0000000010", "based 0000000020 #2", "based 0000000020 #3"]


def test_unfinished_runs_are_shown_up_to_their_last_step(tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.json").write_text("{}")
    write_report([fresh, make_run(tmp_path / "b", "based", tested=False)], tmp_path / "out.html")
    texts = assert_harmless((tmp_path / "out.html").read_text()).texts
    assert {"at step 0", "at step 20", "No run has been evaluated on the test split yet."} <= set(texts)
    write_report([fresh], tmp_path / "out.html")
    write_report([fresh, make_run(tmp_path / "c", "mom")], tmp_path / "out.html")


def test_non_finite_numbers_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "based", tested=False)
    with RunLog(run / "log.jsonl", "f") as log:
        log.write("train", 30, {"loss": float("nan")})
        log.write("eval", 30, {"split": "test", "accuracy": float("nan"), "loss": float("inf"), "group/x": None})
    write_report([run, make_run(tmp_path / "b", "mom")], tmp_path / "out.html")
    assert {"nan", "inf"} <= set(assert_harmless((tmp_path / "out.html").read_text()).texts)


@pytest.mark.fault("S9", "S10")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_escaped(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "a", name)
    write_report([run, make_run(tmp_path / "b", name, size=8192)], tmp_path / "out.html")
    parsed = assert_harmless((tmp_path / "out.html").read_text())
    assert any(printable(name) in text for text in parsed.texts), "escaped, not removed"
    markdown = (tmp_path / "out.md").read_text()
    assert "<" not in markdown and "](" not in markdown and len(markdown.splitlines()) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines()}) == 1


@pytest.mark.fault("S10")
@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\n=1", " =1", "plain"])
def test_csv_cells_are_not_formulas(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "a", name, accuracy=-0.5)
    write_report([run], tmp_path / "out.html")
    header, row = csv.reader(io.StringIO((tmp_path / "out.csv").read_text()))
    assert name == "plain" or row[0].startswith(("'", "\\")), "a control character is escaped with a backslash"
    assert float(row[header.index("test accuracy")]) == -0.5, "a negative number is not a formula"
    for cell in (*header, *row):
        assert cell.lstrip()[:1] not in tuple("=+-@") or cell == "-0.5"


def test_reports_are_deterministic(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "based"), make_run(tmp_path / "b", "mom")]
    pages = []
    for _ in range(2):
        write_report(runs, tmp_path / "out.html")
        pages.append((tmp_path / "out.html").read_bytes())
    assert pages[0] == pages[1]


def test_folders_without_a_run_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="at least one"):
        write_report([], tmp_path / "out.html")
    with pytest.raises(RunFolderError, match="absent is not a run"):
        write_report([tmp_path / "absent"], tmp_path / "out.html")
    run = make_run(tmp_path / "a", "based")
    (run / "log.jsonl").write_text("garbage\n" + (run / "log.jsonl").read_text())
    with pytest.raises(LogError, match="line 1"):
        write_report([run], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_assert_harmless_detects_harmful_pages() -> None:
    """The assertions above must fail on the elements that they forbid."""
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    assert_harmless(policy)
    harms = [
        "<script>",
        "<p onclick=x>",
        "<p style='//x'>",
        "<use xlink:href='x'>",
        "<style>@import 'x'</style>",
    ]
    for harm in harms:
        with pytest.raises(AssertionError):
            assert_harmless(policy + harm)
    with pytest.raises(AssertionError):
        assert_harmless("<p>")
