"""Tables from the rows: `python -m experiments.key_retrieval.report` rewrites table.md."""

from collections.abc import Sequence
from pathlib import Path

from experiments.cell import Row
from experiments.key_retrieval.arms import ARMS, best_rate
from experiments.key_retrieval.measure import COUNTS, LENGTHS, rows

HERE = Path(__file__).parent


def table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table, and an empty line."""
    return ["| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines)] + [""]


def training(found: list[Row]) -> list[str]:
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
        for row in sorted(found, key=lambda row: (list(ARMS).index(row["arm"]), row["lr"]))
    ]
    return table(["arm", "rate", "64 tokens, 4 facts", "256, 1", "256, 8", "CPU s"], lines)


def recall(found: list[Row], keys: int) -> list[str]:
    """Accuracy on test by way of reading and length."""
    held = {(row["arm"], row["top_k"], row["length"]): row["accuracy"] for row in found if row["keys"] == keys}
    ways = [("landmark", k) for k in (0, *COUNTS, None)] + [("attention", None), ("window", None)]
    lines = []
    for arm, top_k in ways:
        cells = [f"{held[arm, top_k, n]:.3f}" if (arm, top_k, n) in held else "" for n in LENGTHS]
        if any(cells):
            name = arm if arm != "landmark" else f"landmark, {'all' if top_k is None else top_k} blocks"
            lines.append([name, *cells])
    return table([f"{keys} fact{'s' if keys > 1 else ''}", *LENGTHS], lines)


def traffic(found: list[Row]) -> list[str]:
    """Bytes by k and by context."""
    lines = [
        [
            row["length"],
            row["top_k"],
            f"{row['right']} of {row['asked']}",
            f"{row['fetched_per_token'] / 2**10:.1f}",
            f"{row['host'] / 2**10:.0f}",
            f"{row['device'] / 2**10:.0f}",
        ]
        for row in sorted(found, key=lambda row: (row["length"], row["top_k"]))
    ]
    head = ["context", "k", "right", "KB fetched per decoded token", "KB on the host", "KB on the device"]
    return table(head, lines)


def times(found: list[Row]) -> list[str]:
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
    lines = training(rows("train")) + recall(rows("recall"), 8) + recall(rows("recall"), 1)
    lines += traffic(rows("offload")) + times(rows("time"))
    (HERE / "table.md").write_text("\n".join(lines).strip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
