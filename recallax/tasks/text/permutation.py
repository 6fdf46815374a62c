"""A random permutation of 0..n-1 with random access and no storage.

A Feistel network permutes the numbers of 2k bits, for the smallest k with 4^k >= n: fewer than 4 n numbers. A result
outside 0..n-1 is permuted again until it is inside (cycle walking), so the result is a permutation of 0..n-1.
Source: Black & Rogaway 2002 (Ciphers with Arbitrary Finite Domains), sections 3 and 4.
"""

import numpy as np
from jaxtyping import Int, UInt64

FEISTEL_ROUNDS = 8
"""Rounds of the network; 4 already give a pseudorandom permutation (Luby & Rackoff 1988)."""


def permute_index(indices: Int[np.ndarray, " N"], count: int, keys: UInt64[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Permute indices, each by the permutation of its key.

    Args:
        indices: Integers from 0 to `count` - 1.
        count: Number of permuted values n.
        keys: Key of each index's permutation.

    Returns:
        The permuted indices, int64.
    """
    bits = np.uint64(max((count - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    rounds = [splitmix64(keys.astype(np.uint64) + np.uint64(i)) for i in range(FEISTEL_ROUNDS)]
    values = indices.astype(np.uint64)
    outside = np.arange(len(values))
    while outside.size:
        left, right = values[outside] >> bits, values[outside] & mask
        for key in rounds:
            left, right = right, left ^ (splitmix64(right ^ key[outside]) & mask)
        values[outside] = left << bits | right
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def splitmix64(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """Hash 64-bit words bijectively (splitmix64, Steele et al. 2014).

    Args:
        x: Words.

    Returns:
        The hashed words.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
