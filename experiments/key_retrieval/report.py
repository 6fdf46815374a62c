"""Tables of the rows: `python -m experiments.key_retrieval.report` rewrites table.md."""

from collections.abc import Sequence
from pathlib import Path

from experiments.key_retrieval.measure import ROWS_PER_LENGTH, TOP_KS
from experiments.key_retrieval.variants import VARIANTS, best_rate
from experiments.results import markdown_row, read_rows, write_table
from recallax.sweep import ResultRow

FOLDER = Path(__file__).parent


def table(rows: list[ResultRow]) -> str:
    """Format all tables: training, recall of eight facts and of one, traffic and time."""
    stages = {name: [row for row in rows if row["stage"] == name] for name in ("train", "recall", "offload", "time")}
    tables = [
        _training_table(stages["train"]),
        _recall_table(stages["recall"], keys=8),
        _recall_table(stages["recall"], keys=1),
        _traffic_table(stages["offload"]),
        _time_table(stages["time"]),
    ]
    return "\n\n".join(tables)


def _markdown(header: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    return "\n".join(map(markdown_row, [header, ["---"] * len(header), *lines]))


def _training_table(rows: list[ResultRow]) -> str:
    lines = [
        [
            row["arm"],
            f"{row['lr']:g}" + (" (chosen)" if row["lr"] == best_rate(rows, row["arm"]) else ""),
            f"{row['stage 1']['accuracy']:.3f}",
            f"{row['stage 2']['group/L256_K1']:.3f}",
            f"{row['stage 2']['group/L256_K8']:.3f}",
            f"{row['cpu_seconds']:.0f}",
        ]
        for row in sorted(rows, key=lambda row: (list(VARIANTS).index(row["arm"]), row["lr"]))
    ]
    return _markdown(["arm", "rate", "64 tokens, 4 facts", "256, 1", "256, 8", "CPU s"], lines)


def _recall_table(rows: list[ResultRow], keys: int) -> str:
    accuracy = {(row["arm"], row["top_k"], row["length"]): row["accuracy"] for row in rows if row["keys"] == keys}
    variants = [("landmark", k) for k in (0, *TOP_KS, None)] + [("attention", None), ("window", None)]
    lines = []
    for variant, top_k in variants:
        cells = [f"{accuracy[key]:.3f}" if (key := (variant, top_k, n)) in accuracy else "" for n in ROWS_PER_LENGTH]
        if any(cells):
            blocks = "all" if top_k is None else top_k
            lines.append([f"landmark, {blocks} blocks" if variant == "landmark" else variant, *cells])
    return _markdown([f"{keys} fact{'s' if keys > 1 else ''}", *ROWS_PER_LENGTH], lines)


def _traffic_table(rows: list[ResultRow]) -> str:
    lines = [
        [
            row["length"],
            row["top_k"],
            f"{row['right']} of {row['asked']}",
            f"{row['fetched_per_token'] / 2**10:.1f}",
            f"{row['host_bytes'] / 2**10:.0f}",
            f"{row['device_bytes'] / 2**10:.0f}",
        ]
        for row in sorted(rows, key=lambda row: (row["length"], row["top_k"]))
    ]
    return _markdown(
        ["context", "k", "right", "KB fetched per decoded token", "KB on the host", "KB on the device"], lines
    )


def _time_table(rows: list[ResultRow]) -> str:
    lines = [
        [
            row["length"],
            row["real"],
            "forward and backward" if row["gradient"] else "forward",
            row["landmark"],
            row["full"],
            f"{row['landmark'] / row['full']:.2f}",
        ]
        for row in rows
    ]
    return _markdown(["tokens", "in a block", "pass", "landmark, ms", "full, ms", "ratio"], lines)


def main() -> None:
    """Write `table.md`."""
    write_table(table(read_rows(FOLDER)), FOLDER)


if __name__ == "__main__":
    main()
