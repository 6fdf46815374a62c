"""A random order of 0..n-1 that is computed entry by entry and stored nowhere.

A Feistel network permutes the 2k-bit numbers, of which there are fewer than 4 n; what falls outside 0..n-1 is sent
through again until it falls inside (cycle walking), so the whole is a permutation of 0..n-1.
Source: Black & Rogaway 2002 (Ciphers with Arbitrary Finite Domains), sections 3 and 4.
"""

import numpy as np
from jaxtyping import Int, UInt64

FEISTEL_ROUNDS = 8


def permute_index(indices: Int[np.ndarray, " N"], count: int, keys: UInt64[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Which entry stands at each place of the order that its key names; `indices` are from 0 to count - 1."""
    bits = np.uint64(max((count - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    rounds = [splitmix64(keys.astype(np.uint64) + np.uint64(i)) for i in range(FEISTEL_ROUNDS)]
    found = indices.astype(np.uint64)
    walking = np.arange(len(found))
    while walking.size:
        left, right = found[walking] >> bits, found[walking] & mask
        for key in rounds:
            left, right = right, left ^ (splitmix64(right ^ key[walking]) & mask)
        found[walking] = left << bits | right
        walking = walking[found[walking] >= count]
    return found.astype(np.int64)


def splitmix64(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """A bijection of 64-bit words in which every bit depends on every other (splitmix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
