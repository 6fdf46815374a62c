"""Accuracy by order and the gap between the orders, from the rows."""

from pathlib import Path

from experiments.set_disjointness.sweep import MIXERS
from experiments.train_cell import ResultRow, best_row

SHORT, LONG = "group/short_first_4_16", "group/long_first_4_16"


def main(rows: list[ResultRow], folder: Path) -> None:
    head = "| model | state bytes | rate | short first | long first | gap (short - long first) |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name in MIXERS:
        rate = best_row(rows, "grid", mixer=name)["lr"]
        final = [r for r in rows if r["stage"] == "seeds" and r["mixer"] == name and r["lr"] == rate]
        short, long = ([r["test"][key] for r in final] for key in (SHORT, LONG))
        gaps = " ".join(f"{a - b:+.3f}" for a, b in zip(short, long, strict=True))
        both = [" ".join(f"{x:.3f}" for x in values) for values in (short, long)]
        size = final[0]["state_bytes"] or "none"
        lines.append(f"| {name} | {size} | {rate:g} | {both[0]} | {both[1]} | {gaps} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
