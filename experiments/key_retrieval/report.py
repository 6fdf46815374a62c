"""Tables from the rows: `python -m experiments.key_retrieval.report` rewrites table.md."""

from collections.abc import Sequence
from pathlib import Path

from experiments.key_retrieval.measure import ROWS_PER_LENGTH, TOP_KS, stage_rows
from experiments.key_retrieval.variants import VARIANTS, best_rate
from experiments.train_cell import ResultRow

FOLDER = Path(__file__).parent


def table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table, and an empty line."""
    return ["| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines)] + [""]


def training_table(found: list[ResultRow]) -> list[str]:
    """Accuracy on valid by arm and rate."""
    lines = [
        [
            row["arm"],
            f"{row['lr']:g}" + (" (chosen)" if row["lr"] == best_rate(found, row["arm"]) else ""),
            f"{row['stage 1']['accuracy']:.3f}",
            f"{row['stage 2']['group/L256_K1']:.3f}",
            f"{row['stage 2']['group/L256_K8']:.3f}",
            f"{row['cpu_seconds']:.0f}",
        ]
        for row in sorted(found, key=lambda row: (list(VARIANTS).index(row["arm"]), row["lr"]))
    ]
    return table(["arm", "rate", "64 tokens, 4 facts", "256, 1", "256, 8", "CPU s"], lines)


def recall_table(found: list[ResultRow], keys: int) -> list[str]:
    """Accuracy on test by way of reading and length."""
    held = {(row["arm"], row["top_k"], row["length"]): row["accuracy"] for row in found if row["keys"] == keys}
    ways = [("landmark", k) for k in (0, *TOP_KS, None)] + [("attention", None), ("window", None)]
    lines = []
    for arm, top_k in ways:
        cells = [f"{held[arm, top_k, n]:.3f}" if (arm, top_k, n) in held else "" for n in ROWS_PER_LENGTH]
        if any(cells):
            name = arm if arm != "landmark" else f"landmark, {'all' if top_k is None else top_k} blocks"
            lines.append([name, *cells])
    return table([f"{keys} fact{'s' if keys > 1 else ''}", *ROWS_PER_LENGTH], lines)


def traffic_table(found: list[ResultRow]) -> list[str]:
    """Bytes by k and by context."""
    lines = [
        [
            row["length"],
            row["top_k"],
            f"{row['right']} of {row['asked']}",
            f"{row['fetched_per_token'] / 2**10:.1f}",
            f"{row['host_bytes'] / 2**10:.0f}",
            f"{row['device_bytes'] / 2**10:.0f}",
        ]
        for row in sorted(found, key=lambda row: (row["length"], row["top_k"]))
    ]
    head = ["context", "k", "right", "KB fetched per decoded token", "KB on the host", "KB on the device"]
    return table(head, lines)


def time_table(found: list[ResultRow]) -> list[str]:
    """Milliseconds of both attentions."""
    lines = [
        [
            row["length"],
            row["real"],
            "forward and backward" if row["gradient"] else "forward",
            row["landmark"],
            row["full"],
            f"{row['landmark'] / row['full']:.2f}",
        ]
        for row in found
    ]
    return table(["tokens", "in a block", "pass", "landmark, ms", "full, ms", "ratio"], lines)


def main() -> None:
    """Write and print all tables."""
    lines = (
        training_table(stage_rows("train"))
        + recall_table(stage_rows("recall"), 8)
        + recall_table(stage_rows("recall"), 1)
    )
    lines += traffic_table(stage_rows("offload")) + time_table(stage_rows("time"))
    (FOLDER / "table.md").write_text("\n".join(lines).strip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
