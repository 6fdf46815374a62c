"""Accuracy of reading once and twice at equal state, from the rows."""

from pathlib import Path

from experiments.multi_pass.sweep import MIXERS
from experiments.train_cell import ResultRow, best_row


def main(rows: list[ResultRow], folder: Path) -> None:
    lines = ["| model | state bytes | rate | 4 pairs | 8 pairs | both, two seeds |", "|---|---|---|---|---|---|"]
    for name in MIXERS:
        rate = best_row(rows, "grid", mixer=name)["lr"]
        final = [r for r in rows if r["stage"] == "seeds" and r["mixer"] == name and r["lr"] == rate]
        four, eight = (sum(r["test"][f"group/L32_K{k}"] for r in final) / len(final) for k in (4, 8))
        both = " ".join(f"{r['test']['accuracy']:.3f}" for r in final)
        lines.append(f"| {name} | {final[0]['state_bytes']} | {rate:g} | {four:.3f} | {eight:.3f} | {both} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
