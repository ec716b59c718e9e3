"""Counter-based noise: one uniform number per (seed, rollout, position), whoever asks and in whatever order."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def keys(seed: int, names: Sequence[str]) -> np.ndarray:
    """64-bit keys [N] (uint64) of the named streams, e.g. rollout ids, under `seed`."""
    digests = b"".join(blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def uniform(stream: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Uniform numbers in the open interval (0, 1), float64.

    stream [...] uint64 keys and position [...] counters broadcast together. The generator is splitmix64 (Steele, Lea
    and Flood, OOPSLA 2014), whose state after n steps is key + n * gamma, so that every position is reached directly.
    """
    state = stream + (position.astype(np.uint64) + np.uint64(1)) * _GAMMA
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    state = state ^ (state >> np.uint64(31))
    # 52 bits and a half: with 53 the largest value would round to 1.0.
    return ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
