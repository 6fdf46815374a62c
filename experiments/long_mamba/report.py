"""The table of lengths, from the rows."""

from pathlib import Path

from experiments.long_mamba.sweep import KEPT_FRACTIONS, LENGTH, LENGTH_FACTORS
from experiments.train_cell import ResultRow


def main(rows: list[ResultRow], folder: Path) -> None:
    lengths = " | ".join(f"{factor * LENGTH}" for factor in LENGTH_FACTORS)
    lines = [f"| task | mixer | filters | {lengths} |", "|---" * (3 + len(LENGTH_FACTORS)) + "|"]
    arms = sorted({(row["task"], row["mixer"]) for row in rows})
    for name, mixer in arms:
        runs = sorted((r for r in rows if (r["task"], r["mixer"]) == (name, mixer)), key=lambda r: r["seed"])
        for key in ("plain", *(f"{keeps:g}" for keeps in KEPT_FRACTIONS)):
            told = "none" if key == "plain" else f"keeping {key}"
            cells = [" ".join(f"{run['lengths'][str(factor)][key]:.3f}" for run in runs) for factor in LENGTH_FACTORS]
            lines.append(f"| {name} | {mixer} | {told} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    (folder / "table.md").write_text(text + "\n")
    print(text)
