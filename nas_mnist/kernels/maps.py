"""How a map (C, H, W, N) lies in memory: plane by plane, the batch innermost."""

from numpy.lib.stride_tricks import as_strided

from nas_mnist.kernels import vectors
from nas_mnist.kernels.compilation import kernel

LINE = vectors.LINE // 4  # numbers of a cache line


@kernel
def plane_size(h, w, n):
    """The numbers from one channel's plane to the next: an odd number of cache lines.

    One pixel of all channels, which a convolution reads at once, is then spread over the cache. With a power of two
    between them, as 24 · 24 · 64 has, they would all be kept in the same few lines.
    """
    size = h * w * n
    return size if size // LINE % 2 else size + LINE


@kernel
def as_map(numbers, c, h, w, n):
    """A map whose first plane begins where these numbers do."""
    return as_strided(numbers, (c, h, w, n), (4 * plane_size(h, w, n), 4 * w * n, 4 * n, 4))


@kernel
def plane_stride(x):
    """The numbers from one plane of this map to the next."""
    return x.strides[0] // 4
