"""Dropout's masks from a counter-based generator: what is drawn depends on the seed, the step, the layer and the place.

SplitMix64: G. L. Steele, D. Lea and C. H. Flood, Fast Splittable Pseudorandom Number Generators, 2014.
"""

import numpy as np

from nas_mnist.kernels.compilation import kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@kernel
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


@kernel
def stream(seed, step, layer):
    """The key of the numbers that one layer draws in one step."""
    return _mix(_mix(np.uint64(seed) + _GOLDEN * np.uint64(step + 1)) + np.uint64(layer))


@kernel
def draw_mask(mask, valid, rate, key, channel):
    """Fill the channel's row (N,) with 0, or 1 / (1 − rate); with 0 where `valid` (N,) is."""
    n = len(mask)
    for i in range(n):
        mask[i] = _draw(key, channel * n + i, rate) * valid[i]


@kernel
def drop_elements(x, y, rate, key):
    """y = x times a mask with a number for each element; maps of one shape."""
    place = 0
    for c in range(x.shape[0]):
        for r in range(x.shape[1]):
            for s in range(x.shape[2]):
                for i in range(x.shape[3]):
                    y[c, r, s, i] = x[c, r, s, i] * _draw(key, place, rate)
                    place += 1


@kernel
def _draw(key, place, rate):
    uniform = np.float32(_mix(key + _GOLDEN * np.uint64(place + 1)) >> np.uint64(40)) * np.float32(2**-24)
    return np.float32(0) if uniform < np.float32(rate) else np.float32(1 / (1 - rate))
