"""What follows a convolution: batch norm and ReLU in either order, dropout of channels, and a max-pool behind them.

All is one formula, y = max(max(x, low)·scale + shift, high): one of the two floors is out of the way; scale and shift,
a row of the batch for each channel, have dropout's mask in them. The gradient of x is computed from x again, so that
the normalised map need not be kept. A kernel works on the maps' vectors at one place of the batch, pixel by pixel.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import intrinsic

from nas_mnist.kernels.compilation import kernel
from nas_mnist.kernels.vectors import INT, STEP, VECTORS, Loop, Vectors, address, constant, load, lowered, splat, store

LOWEST = np.float32(-3e38)  # a floor that changes nothing
ZERO = np.float32(0)
MASK, SCALE, SHIFT, FACTOR = range(4)  # rows of a channel, each a number for each image
STD_FACTOR, OFFSET, MEAN, INVERSE_STD = range(4)  # statistics of a channel


class Activation(NamedTuple):
    """What follows a convolution of C channels, and what its gradient needs. All float32."""

    low: np.float32
    high: np.float32
    has_norm: bool
    rows: np.ndarray  # (4, C, N); MASK is 0 in the padding of the batch
    statistics: np.ndarray  # (4, C)
    weight: np.ndarray  # (C,); this and all below are empty without a norm
    bias: np.ndarray
    grad_weight: np.ndarray
    grad_bias: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray


@kernel
def activate(x, activation, first, y):
    """Maps x → y, both (C, H, W, N); channels are counted from the `first`."""
    rows = activation.rows
    _, h, w, n = x.shape
    for i in range(len(x)):
        c = first + i
        _activate(
            x[i].ctypes.data, y[i].ctypes.data, h * w, n, rows[SCALE, c].ctypes.data, rows[SHIFT, c].ctypes.data,
            activation.low, activation.high,
        )  # fmt: skip


@kernel
def activate_pool(x, activation, first, y):
    """With a 2×2 max-pool, an odd last row or column dropped: (C, H, W, N) → (C, H // 2, W // 2, N)."""
    rows = activation.rows
    _, h, w, n = y.shape
    for i in range(len(x)):
        c = first + i
        _activate_pool(
            x[i].ctypes.data, y[i].ctypes.data, h, w, x.shape[2] * n, n, rows[SCALE, c].ctypes.data,
            rows[SHIFT, c].ctypes.data, activation.low, activation.high,
        )  # fmt: skip


@kernel
def measure(plane, activation, c, valid, n_images, momentum, eps):
    """Batch norm's statistics of a channel's plane (H, W, N): the batch's, and their part in the running ones."""
    h, w, n = plane.shape
    pivot = max(plane[0, 0, 0], activation.low)
    sums = np.zeros((2, STEP), np.float32)
    _add_moments(plane.ctypes.data, h * w, n, valid.ctypes.data, sums.ctypes.data, pivot, activation.low)
    total, total_squares = reduce(sums)
    set_moments(activation, c, pivot, total, total_squares, h * w * n_images, momentum, eps)


@kernel
def set_moments(activation, c, pivot, total, total_squares, count, momentum, eps):
    """From the sums of numbers, counted from a pivot: an offset of the whole map would eat up the variance's digits."""
    shift = total / count
    mean, variance = pivot + shift, max(total_squares / count - shift * shift, 0.0)
    running_mean, running_var = activation.running_mean, activation.running_var
    running_mean[c] += momentum * (mean - running_mean[c])
    running_var[c] += momentum * (variance * count / (count - 1) - running_var[c])
    normalise(activation, c, mean, variance, eps)


@kernel
def normalise(activation, c, mean, variance, eps):
    """Set what the channel is scaled and shifted by."""
    rows, statistics = activation.rows, activation.statistics
    inverse_std = 1 / np.sqrt(variance + eps)
    factor = activation.weight[c] * inverse_std
    offset = activation.bias[c] - mean * factor
    statistics[STD_FACTOR, c], statistics[OFFSET, c] = factor, offset
    statistics[MEAN, c], statistics[INVERSE_STD, c] = mean, inverse_std
    for i in range(rows.shape[2]):
        rows[SCALE, c, i] = rows[MASK, c, i] * np.float32(factor)
        rows[SHIFT, c, i] = rows[MASK, c, i] * np.float32(offset)
        rows[FACTOR, c, i] = rows[SCALE, c, i]


@kernel
def set_mask(activation, c):
    """Scale a channel by dropout's mask alone, where there is no norm."""
    rows = activation.rows
    activation.statistics[:, c] = 0
    rows[SCALE, c], rows[SHIFT, c], rows[FACTOR, c] = rows[MASK, c], ZERO, rows[MASK, c]


@kernel
def use_running(activation, c, eps):
    """Norm a channel with the running statistics, as in evaluation."""
    normalise(activation, c, np.float64(activation.running_mean[c]), np.float64(activation.running_var[c]), eps)


@kernel
def activate_backward(x, grad, activation, first, valid, n_images, out):
    """The gradients of norm and input: ∂/∂x = scale·(g − mean(g) − x̂·mean(g·x̂)), g that at the norm's output."""
    _, h, w, n = x.shape
    for i in range(len(x)):
        c, sums = first + i, np.zeros((2, STEP), np.float32)
        source, gradient = x[i].ctypes.data, grad[i].ctypes.data
        if activation.has_norm:
            add_gradients(source, gradient, h * w, n, activation, c, sums)
        slope, offset = set_gradients(activation, c, sums, h * w * n_images)
        input_gradient(source, gradient, h * w, n, activation, c, valid, slope, offset, out[i].ctypes.data)


@kernel
def add_gradients(x, grad, n_pixels, n, activation, c, sums):
    """Add to (2, STEP) the sums of g and of g·(x − mean) over pixels (n_pixels, N) of a channel, at addresses."""
    rows = activation.rows
    _add_gradients(
        x, grad, n_pixels, n, rows[SCALE, c].ctypes.data, rows[SHIFT, c].ctypes.data, rows[MASK, c].ctypes.data,
        sums.ctypes.data, activation.statistics[MEAN, c], activation.low, activation.high,
    )  # fmt: skip


@kernel
def set_gradients(activation, c, sums, count):
    """The gradients of the norm's parameters, and what that of the input is beside scale·g: x·slope + offset."""
    if not activation.has_norm:
        return ZERO, ZERO
    statistics = activation.statistics
    total, moment = reduce(sums)
    scale, mean, inverse_std = statistics[STD_FACTOR, c], statistics[MEAN, c], statistics[INVERSE_STD, c]
    activation.grad_bias[c], activation.grad_weight[c] = total, moment * inverse_std
    slope = -scale * inverse_std * (moment * inverse_std) / count
    return np.float32(slope), np.float32(-scale * total / count - mean * slope)


@kernel
def input_gradient(x, grad, n_pixels, n, activation, c, valid, slope, offset, out):
    """scale·g + x·slope + offset over pixels (n_pixels, N) of a channel, at addresses; 0 in the padding."""
    rows = activation.rows
    _input_gradient(
        x, grad, out, n_pixels, n, rows[SCALE, c].ctypes.data, rows[SHIFT, c].ctypes.data, rows[FACTOR, c].ctypes.data,
        valid.ctypes.data, slope, offset, activation.low, activation.high,
    )  # fmt: skip


@kernel
def activate_pool_backward(x, grad, activation, first, valid, n_images, out):
    """The same with a max-pool behind; `grad` is that of the pooled map."""
    _, h, w, n = x.shape
    rows = activation.rows
    low, high = activation.low, activation.high
    idle = np.zeros(n, np.float32)
    for i in range(len(x)):
        c = first + i
        scale, shift = rows[SCALE, c].ctypes.data, rows[SHIFT, c].ctypes.data
        sums = np.zeros((2, STEP), np.float32)
        if activation.has_norm:
            _add_pooled_gradients(
                x[i].ctypes.data, grad[i].ctypes.data, h // 2, w // 2, w * n, n, scale, shift,
                rows[MASK, c].ctypes.data, sums.ctypes.data, activation.statistics[MEAN, c], low, high,
            )  # fmt: skip
        slope, offset = set_gradients(activation, c, sums, h * w * n_images)
        _pooled_input_gradient(
            x[i].ctypes.data, grad[i].ctypes.data, out[i].ctypes.data, h // 2, w // 2, w * n, n, scale, shift,
            rows[FACTOR, c].ctypes.data, valid.ctypes.data, slope, offset, low, high,
        )  # fmt: skip
        # An odd last row or column, which the pool does not see, has no gradient but the norm's own.
        for r in range(h):
            start = 0 if r >= h // 2 * 2 else w // 2 * 2
            if start < w:
                edge = x[i, r, start].ctypes.data
                _input_gradient(
                    edge, edge, out[i, r, start].ctypes.data, w - start, n, scale, shift, idle.ctypes.data,
                    valid.ctypes.data, slope, offset, low, high,
                )  # fmt: skip


@kernel
def reduce(sums):
    """The two sums over the lanes, in float64."""
    first, second = 0.0, 0.0
    for i in range(sums.shape[1]):
        first += sums[0, i]
        second += sums[1, i]
    return first, second


# Below are addresses and counts; `n` is the padded batch, x_row the numbers of a row of pixels before the pool.


@intrinsic
def _activate(context, x, y, n_pixels, n, scale, shift, low, high):
    def emit(builder, x, y, n_pixels, n, scale, shift, low, high):
        floors = splat(builder, low), splat(builder, high)
        with _Batch(builder, n) as batch:
            scale, shift = batch.load(scale), batch.load(shift)
            with Loop(builder, n_pixels) as pixel:
                place = builder.mul(pixel.index, n)
                batch.store(_formula(batch.load(x, place), scale, shift, *floors), y, place)

    return lowered(emit, 6, 2)


@intrinsic
def _add_moments(context, x, n_pixels, n, valid, sums, pivot, low):
    def emit(builder, x, n_pixels, n, valid, sums, pivot, low):
        pivot, low = splat(builder, pivot), splat(builder, low)
        with _Batch(builder, n, sums) as batch:
            valid = batch.load(valid)
            with Loop(builder, n_pixels, _zeros(builder, 2)) as pixel:
                v = batch.load(x, builder.mul(pixel.index, n)).at_least(low) - pivot
                pixel.results = _flat(*(s + t for s, t in zip(_pair(builder, pixel.values), (v, v * v), strict=True)))
            batch.add(*(s * valid for s in _pair(builder, pixel.finals)))

    return lowered(emit, 5, 2)


@intrinsic
def _add_gradients(context, x, grad, n_pixels, n, scale, shift, mask, sums, mean, low, high):
    def emit(builder, x, grad, n_pixels, n, scale, shift, mask, sums, mean, low, high):
        mean, low, high = (splat(builder, number) for number in (mean, low, high))
        with _Batch(builder, n, sums) as batch:
            scale, shift, mask = (batch.load(row) for row in (scale, shift, mask))
            with Loop(builder, n_pixels, _zeros(builder, 2)) as pixel:
                place = builder.mul(pixel.index, n)
                v = batch.load(x, place).at_least(low)
                passes = v.times_plus(scale, shift).above(high)
                d = passes.choose(batch.load(grad, place), constant(builder, 0.0))
                pixel.results = _add_gradient(builder, pixel.values, d, v - mean)
            batch.add(*(s * mask for s in _pair(builder, pixel.finals)))

    return lowered(emit, 8, 3)


@intrinsic
def _input_gradient(context, x, grad, out, n_pixels, n, scale, shift, factor, valid, slope, offset, low, high):
    def emit(builder, x, grad, out, n_pixels, n, scale, shift, factor, valid, slope, offset, low, high):
        low, high, zero = splat(builder, low), splat(builder, high), constant(builder, 0.0)
        with _Batch(builder, n) as batch:
            scale, shift, factor, valid = (batch.load(row) for row in (scale, shift, factor, valid))
            own = _Own(splat(builder, slope) * valid, splat(builder, offset) * valid, low)
            with Loop(builder, n_pixels) as pixel:
                place = builder.mul(pixel.index, n)
                x_i = batch.load(x, place)
                d = batch.load(grad, place) * factor
                d = x_i.at_least(low).times_plus(scale, shift).above(high).choose(d, zero)
                batch.store(own.add(x_i, d), out, place)

    return lowered(emit, 9, 4)


@intrinsic
def _activate_pool(context, x, y, h, w, x_row, n, scale, shift, low, high):
    def emit(builder, x, y, h, w, x_row, n, scale, shift, low, high):
        low, high = splat(builder, low), splat(builder, high)
        with _Batch(builder, n) as batch:
            scale, shift = batch.load(scale), batch.load(shift)
            with Loop(builder, h) as row, Loop(builder, w) as column:
                places, place = _pool_places(builder, row.index, column.index, w, x_row, n)
                four = [batch.load(x, p).at_least(low).times_plus(scale, shift) for p in places]
                batch.store(_largest(four)[0].at_least(high), y, place)

    return lowered(emit, 8, 2)


@intrinsic
def _add_pooled_gradients(context, x, grad, h, w, x_row, n, scale, shift, mask, sums, mean, low, high):
    def emit(builder, x, grad, h, w, x_row, n, scale, shift, mask, sums, mean, low, high):
        mean, low, high = (splat(builder, number) for number in (mean, low, high))
        with _Batch(builder, n, sums) as batch:
            scale, shift, mask = (batch.load(row) for row in (scale, shift, mask))
            with Loop(builder, h, _zeros(builder, 2)) as row:
                with Loop(builder, w, row.values) as column:
                    places, place = _pool_places(builder, row.index, column.index, w, x_row, n)
                    values = [batch.load(x, p).at_least(low) for p in places]
                    largest, beaten = _largest([v.times_plus(scale, shift) for v in values])
                    v = values[0]
                    for wins, value in zip(beaten, values[1:], strict=True):
                        v = wins.choose(value, v)
                    d = largest.above(high).choose(batch.load(grad, place), constant(builder, 0.0))
                    column.results = _add_gradient(builder, column.values, d, v - mean)
                row.results = column.finals
            batch.add(*(s * mask for s in _pair(builder, row.finals)))

    return lowered(emit, 10, 3)


@intrinsic
def _pooled_input_gradient(
    context, x, grad, out, h, w, x_row, n, scale, shift, factor, valid, slope, offset, low, high
):  # fmt: skip
    def emit(builder, x, grad, out, h, w, x_row, n, scale, shift, factor, valid, slope, offset, low, high):
        low, high, zero = splat(builder, low), splat(builder, high), constant(builder, 0.0)
        with _Batch(builder, n) as batch:
            scale, shift, factor, valid = (batch.load(row) for row in (scale, shift, factor, valid))
            own = _Own(splat(builder, slope) * valid, splat(builder, offset) * valid, low)
            with Loop(builder, h) as row, Loop(builder, w) as column:
                places, place = _pool_places(builder, row.index, column.index, w, x_row, n)
                pixels = [batch.load(x, p) for p in places]
                largest, beaten = _largest([v.at_least(low).times_plus(scale, shift) for v in pixels])
                d = largest.above(high).choose(batch.load(grad, place) * factor, zero)
                shares = []
                for wins in beaten[::-1]:
                    shares.append(wins.choose(d, zero))
                    d = wins.choose(zero, d)
                for pixel, share, p in zip(pixels, [d, *shares[::-1]], places, strict=True):
                    batch.store(own.add(pixel, share), out, p)

    return lowered(emit, 11, 4)


class _Batch:
    """The code within is run for each step of the batch. `sums` is the address of (2, STEP), which `add` adds to."""

    def __init__(self, builder, n, sums=None):
        self.builder, self.sums = builder, sums
        self.loop = Loop(builder, builder.sdiv(n, INT(STEP)))

    def __enter__(self):
        self.loop.__enter__()
        self.start = self.builder.mul(self.loop.index, INT(STEP))
        return self

    def __exit__(self, *error):
        self.loop.__exit__(*error)

    def load(self, base, place=None):
        place = place or INT(0)
        return load(self.builder, address(self.builder, base, self.builder.add(self.start, place)))

    def store(self, vectors, base, place):
        store(self.builder, vectors, address(self.builder, base, self.builder.add(self.start, place)))

    def add(self, first, second):
        for k, vectors in enumerate((first, second)):
            place = address(self.builder, self.sums, INT(k * STEP))
            store(self.builder, load(self.builder, place) + vectors, place)


class _Own(NamedTuple):
    """What a norm gives the gradient of its input beside scale·g."""

    slope: Vectors
    offset: Vectors
    low: Vectors

    def add(self, x, d):
        v = x.at_least(self.low)
        return x.above(self.low).choose(v.times_plus(self.slope, self.offset) + d, constant(x.builder, 0.0))


def _formula(x, scale, shift, low, high):
    return x.at_least(low).times_plus(scale, shift).at_least(high)


def _largest(four):
    """The largest, and for all but the first whether it beats those before: the first of equals wins, as in PyTorch."""
    largest, beaten = four[0], []
    for value in four[1:]:
        wins = value.above(largest)
        beaten.append(wins)
        largest = wins.choose(value, largest)
    return largest, beaten


def _pool_places(builder, r, s, w, x_row, n):
    """The four pixels that pixel (r, s) of a pooled map is made of, and where it is itself."""
    first = builder.add(builder.mul(builder.mul(r, INT(2)), x_row), builder.mul(builder.mul(s, INT(2)), n))
    below = builder.add(first, x_row)
    place = builder.mul(builder.add(builder.mul(r, w), s), n)
    return (first, builder.add(first, n), below, builder.add(below, n)), place


def _zeros(builder, n):
    return constant(builder, 0.0, n * VECTORS).values


def _flat(*groups):
    return [value for group in groups for value in group.values]


def _pair(builder, values):
    return Vectors(builder, values[:VECTORS]), Vectors(builder, values[VECTORS:])


def _add_gradient(builder, sums, d, v):
    total, moment = _pair(builder, sums)
    return _flat(total + d, d.times_plus(v, moment))
