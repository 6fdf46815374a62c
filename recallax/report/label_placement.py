"""Placement of labels beside the points of a figure, without overlaps."""

from typing import NamedTuple

LINE_HEIGHT, LETTER_WIDTH, GAP = 0.05, 0.0088, 0.013
"""Height of a label, mean width of a letter, and distance of a label from its point, as fractions of the axes."""
MAX_Y = 1.12
"""Upper limit of the y axis; the lower limit is about 0."""
X_OFFSETS = tuple(GAP * k for k in (1, 3, 6, 10, 15, 21, 28))
"""Horizontal distances between a point and its label that are tried."""
Y_OFFSETS = tuple(sorted((k * LINE_HEIGHT / 2 for k in range(-44, 45)), key=abs))
"""Vertical distances that are tried."""


class PointMark(NamedTuple):
    """A point and its error bar. All values are fractions of the axes."""

    x: float
    y: float
    bar_low: float
    bar_high: float


class LabelPosition(NamedTuple):
    """Position of a label: of its start, or of its end."""

    x: float
    y: float
    is_start: bool


class _Box(NamedTuple):
    left: float
    right: float
    bottom: float
    top: float

    def overlaps(self, other: "_Box") -> bool:
        return (
            other.left < self.right and self.left < other.right and other.bottom < self.top and self.bottom < other.top
        )

    def is_inside_axes(self) -> bool:
        return self.left >= 0 and self.right <= 1 and self.bottom >= -0.01 and self.top <= MAX_Y


def place_labels(marks: list[PointMark], labels: list[str]) -> list[LabelPosition]:
    """Place each label as near to its point as possible without covering a label, a point or a bar.

    Positions on the right of a point are preferred. The width of a label is estimated from its number of letters.

    Args:
        marks: The points.
        labels: One label per point; an empty label takes no space.

    Returns:
        One position per label.
    """
    occupied = [_Box(x - GAP / 2, x + GAP / 2, min(low, y - 0.02), max(high, y + 0.02)) for x, y, low, high in marks]
    positions: dict[int, LabelPosition] = {}
    for i in sorted(range(len(marks)), key=lambda i: marks[i][:2]):
        width = LETTER_WIDTH * len(labels[i])
        candidates = _candidate_positions(marks[i])
        positions[i] = next(
            (position for position in candidates if _is_free(_label_box(position, width), occupied)), candidates[0]
        )
        if labels[i]:
            occupied.append(_label_box(positions[i], width))
    return [positions[i] for i in range(len(marks))]


def _candidate_positions(mark: PointMark) -> list[LabelPosition]:
    """Return positions around a point, the best one first."""
    positions = [LabelPosition(mark.x + dx, mark.y + dy, True) for dy in Y_OFFSETS for dx in X_OFFSETS]
    positions += [LabelPosition(mark.x - dx, mark.y + dy, False) for dy in Y_OFFSETS for dx in X_OFFSETS]

    def cost(position: LabelPosition) -> float:
        # The figure is about twice as wide as high, and the left side costs a little more.
        return abs(position.y - mark.y) + 2 * abs(position.x - mark.x) + 0.03 * (not position.is_start)

    return sorted(positions, key=cost)


def _label_box(position: LabelPosition, width: float) -> _Box:
    left = position.x if position.is_start else position.x - width
    return _Box(left, left + width, position.y - 0.45 * LINE_HEIGHT, position.y + 0.45 * LINE_HEIGHT)


def _is_free(box: _Box, occupied: list[_Box]) -> bool:
    return box.is_inside_axes() and not any(box.overlaps(other) for other in occupied)
