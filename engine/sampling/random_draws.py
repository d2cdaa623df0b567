"""Counter-based random numbers: a draw depends on what it is for, not on what came before.

The hash is the finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
Generators, OOPSLA 2014), applied once per part of the counter.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["uniform"]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def uniform(
    seeds: npt.NDArray[np.uint64],
    samples: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.uint64],
) -> npt.NDArray[np.float64]:
    """One number in [0, 1), of 53 bits, for each (seed, sample, position); arrays of [B]."""
    z = _mix(seeds + _GAMMA)
    z = _mix(z ^ (samples + np.uint64(1)) * _GAMMA)
    z = _mix(z ^ (positions + np.uint64(1)) * _GAMMA)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
