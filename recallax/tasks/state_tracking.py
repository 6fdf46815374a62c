"""Word problems of finite groups (Merrill et al. 2024, The Illusion of State; Grazzi et al. 2025 for parity)."""

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from recallax.config import ConfigError, suggest_name
from recallax.tasks.base import Split, Task, batch_rng
from recallax.types import Batch, unpacked_seq_info

FiniteGroup = Literal["parity", "S3", "A5", "Z60", "S5"]


@dataclass(frozen=True, kw_only=True)
class StateTracking(Task):
    """Compute the product of all group elements so far, at every position.

    Tokens are uniform elements of the group and the target at t is the product of tokens 0..t, with the earliest token
    acting first. Elements are permutations numbered in lexicographic order, so id 0 is the identity. Z60 is the group
    of rotations of 60 points and parity that of 2 points; their ids are residues and the product is the sum.

    Every prefix of a row is an example too, so train rows have one length; test rows are longer. Metrics are reported
    for ranges of positions ("t33_64": the 33rd to the 64th), since accuracy falls with the distance from the start. The
    weights of a row sum to 1. A fixed depth of diagonal recurrences cannot track S5 and A5.
    """

    group: FiniteGroup = "S5"
    """The group: parity (Z2), S3, A5, Z60 or S5."""
    length: int = 32
    """Length of the train rows in tokens."""
    test_lengths: tuple[int, ...] = (32, 64, 128, 256)
    """Lengths of the valid and test batches, which use them in turn."""

    def __post_init__(self) -> None:
        if self.group not in get_args(FiniteGroup):
            raise ConfigError(
                f"StateTracking.group is {self.group!r}{suggest_name(self.group, list(get_args(FiniteGroup)))}"
            )
        if not self.test_lengths or min(self.length, *self.test_lengths) < 1:
            raise ConfigError(
                f"StateTracking.length is {self.length} and test_lengths {self.test_lengths}; there must be a test "
                "length and each must be at least 1"
            )

    @property
    def vocab_size(self) -> int:
        return len(group_elements(self.group))

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"t{a + 1}_{b}" for a, b in itertools.pairwise((0, *self._position_bucket_ends)))

    def lengths(self, split: Split) -> tuple[int, ...]:
        return (self.length,) if split == "train" else tuple(sorted(set(self.test_lengths)))

    def max_targets(self, split: Split, length: int) -> int:
        return length

    def batch(self, seed: int, split: Split, index: int, size: int) -> Batch:
        rng = batch_rng(seed, split, index, "state")
        length = self.length if split == "train" else self.test_lengths[index % len(self.test_lengths)]
        tokens = rng.integers(self.vocab_size, size=(size, length), dtype=np.int32)
        table, targets = cayley_table(self.group), tokens.copy()
        for t in range(1, length):
            targets[:, t] = table[targets[:, t - 1], tokens[:, t]]
        weights = np.full((size, length), 1 / length, np.float32)
        bucket = np.searchsorted(self._position_bucket_ends, np.arange(1, length + 1))
        group = np.broadcast_to(bucket, (size, length)).astype(np.int32)
        return Batch(tokens, targets, weights, np.zeros_like(group), group, unpacked_seq_info(size, length))

    def solve(self, tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
        """Apply the permutations to points, without the multiplication table."""
        permutations = group_elements(self.group)
        number = {tuple(p): i for i, p in enumerate(permutations.tolist())}
        answers = np.zeros_like(tokens)
        for row, answer in zip(tokens, answers, strict=True):
            points = np.arange(permutations.shape[1])
            for t, token in enumerate(row):
                points = permutations[token][points]
                answer[t] = number[tuple(points.tolist())]
        return answers

    def chance(self) -> float:
        """Return the accuracy of a random element: a product with a uniform factor is uniform."""
        return 1 / self.vocab_size

    @property
    def _position_bucket_ends(self) -> tuple[int, ...]:
        return tuple(sorted({self.length, *self.test_lengths}))


@cache
def group_elements(group: FiniteGroup) -> Int[np.ndarray, "G N"]:
    """List a group's permutations.

    Args:
        group: Name of the group.

    Returns:
        The permutations p in lexicographic order, [elements, points]; they map point i to p[i].
    """
    degree = int(group[1:]) if group != "parity" else 2
    if group in ("parity", "Z60"):
        return np.add.outer(np.arange(degree), np.arange(degree)) % degree
    permutations = np.array(list(itertools.permutations(range(degree))))
    if group.startswith("S"):
        return permutations
    first, second = np.triu_indices(degree, 1)
    inversions = (permutations[:, first] > permutations[:, second]).sum(axis=1)
    return permutations[inversions % 2 == 0]


@cache
def cayley_table(group: FiniteGroup) -> Int[np.ndarray, "G G"]:
    """Compute a group's multiplication table.

    Args:
        group: Name of the group.

    Returns:
        The table, int32; entry [a, b] is the element that applies a and then b.
    """
    permutations = group_elements(group)
    number = {p.tobytes(): i for i, p in enumerate(permutations)}
    size = len(permutations)
    return np.array([number[b[a].tobytes()] for a in permutations for b in permutations], np.int32).reshape(size, size)
