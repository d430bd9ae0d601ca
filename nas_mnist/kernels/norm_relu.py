"""What follows a convolution: batch norm and an activation, dropout of channels, and a max-pool behind them.

With a ReLU, in either order, all is one formula, y = max(max(x, low)·scale + shift, high): one of the two floors is out
of the way; scale and shift, a row of the batch for each channel, have dropout's mask in them. With a hard-swish it is
y = mask·h(x·scale + shift), h(z) = z·min(max(z/6 + ½, 0), 1): there is no floor, and the mask stands apart, because
h(z)·mask is not h(z·mask). The gradient of x is computed from x again, so that the normalised map need not be kept. A
kernel works on the maps' vectors at one place of the batch, pixel by pixel.
"""

from typing import NamedTuple

import numpy as np
from numba.extending import intrinsic

from nas_mnist.kernels.compilation import kernel
from nas_mnist.kernels.instructions import Curve
from nas_mnist.kernels.vectors import (
    INT,
    STEP,
    VECTORS,
    Loop,
    Vectors,
    address,
    constant,
    load,
    lowered,
    splat,
    store,
    switch,
)

LOWEST = np.float32(-3e38)  # a floor that changes nothing
ZERO = np.float32(0)
MASK, SCALE, SHIFT, FACTOR = range(4)  # rows of a channel, each a number for each image
STD_FACTOR, OFFSET, MEAN, INVERSE_STD = range(4)  # statistics of a channel


class Activation(NamedTuple):
    """What follows a convolution of C channels, and what its gradient needs. All float32."""

    curve: int
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
            activation.curve, x[i].ctypes.data, y[i].ctypes.data, h * w, n, rows[SCALE, c].ctypes.data,
            rows[SHIFT, c].ctypes.data, rows[MASK, c].ctypes.data, activation.low, activation.high,
        )  # fmt: skip


@kernel
def activate_pool(x, activation, first, y):
    """With a 2×2 max-pool, an odd last row or column dropped: (C, H, W, N) → (C, H // 2, W // 2, N)."""
    rows = activation.rows
    _, h, w, n = y.shape
    for i in range(len(x)):
        c = first + i
        _activate_pool(
            activation.curve, x[i].ctypes.data, y[i].ctypes.data, h, w, x.shape[2] * n, n, rows[SCALE, c].ctypes.data,
            rows[SHIFT, c].ctypes.data, rows[MASK, c].ctypes.data, activation.low, activation.high,
        )  # fmt: skip


@kernel
def measure(plane, activation, c, valid, n_images, momentum, eps):
    """Batch norm's statistics of a channel's plane (H, W, N): the batch's, and their part in the running ones."""
    h, w, n = plane.shape
    pivot = max(plane[0, 0, 0], activation.low)
    sums = np.zeros((2, STEP), np.float32)
    _add_moments(plane.ctypes.data, h, w, n, valid.ctypes.data, sums.ctypes.data, pivot, activation.low)
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
    masked = activation.curve != Curve.HARD_SWISH
    for i in range(rows.shape[2]):
        mask = rows[MASK, c, i]
        rows[SCALE, c, i] = (mask if masked else np.float32(1)) * np.float32(factor)
        rows[SHIFT, c, i] = (mask if masked else np.float32(1)) * np.float32(offset)
        rows[FACTOR, c, i] = mask * np.float32(factor)


@kernel
def set_mask(activation, c):
    """Scale a channel by dropout's mask alone, where there is no norm."""
    rows = activation.rows
    activation.statistics[:, c] = 0
    rows[SCALE, c], rows[SHIFT, c], rows[FACTOR, c] = rows[MASK, c], ZERO, rows[MASK, c]
    if activation.curve == Curve.HARD_SWISH:
        rows[SCALE, c] = np.float32(1)


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
            add_gradients(source, gradient, h, w, n, activation, c, sums)
        slope, offset = set_gradients(activation, c, sums, h * w * n_images)
        input_gradient(source, gradient, h * w, n, activation, c, valid, slope, offset, out[i].ctypes.data)


@kernel
def add_gradients(x, grad, h, w, n, activation, c, sums):
    """Fill (2, STEP) with the sums of g and of g·(x − mean) over a channel's plane (H, W, N); x, grad are addresses."""
    rows = activation.rows
    _add_gradients(
        activation.curve, x, grad, h, w, n, rows[SCALE, c].ctypes.data, rows[SHIFT, c].ctypes.data,
        rows[MASK, c].ctypes.data,
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
        activation.curve, x, grad, out, n_pixels, n, rows[SCALE, c].ctypes.data, rows[SHIFT, c].ctypes.data,
        rows[FACTOR, c].ctypes.data,
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
                activation.curve, x[i].ctypes.data, grad[i].ctypes.data, h // 2, w // 2, w * n, n, scale, shift,
                rows[MASK, c].ctypes.data, sums.ctypes.data, activation.statistics[MEAN, c], low, high,
            )  # fmt: skip
        slope, offset = set_gradients(activation, c, sums, h * w * n_images)
        _pooled_input_gradient(
            activation.curve, x[i].ctypes.data, grad[i].ctypes.data, out[i].ctypes.data, h // 2, w // 2, w * n, n,
            scale, shift,
            rows[FACTOR, c].ctypes.data, valid.ctypes.data, slope, offset, low, high,
        )  # fmt: skip
        # An odd last row or column, which the pool does not see, has no gradient but the norm's own.
        for r in range(h):
            start = 0 if r >= h // 2 * 2 else w // 2 * 2
            if start < w:
                edge = x[i, r, start].ctypes.data
                _input_gradient(
                    activation.curve, edge, edge, out[i, r, start].ctypes.data, w - start, n, scale, shift,
                    idle.ctypes.data,
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
def _activate(context, curve, x, y, n_pixels, n, scale, shift, mask, low, high):
    def emit(builder, curve, x, y, n_pixels, n, scale, shift, mask):
        with Loop(builder, n_pixels) as pixel, _Images(builder, n) as images:
            place = builder.mul(pixel.index, n)
            z = curve.floored(images.load(x, place)).times_plus(images.load(scale), images.load(shift))
            images.store(curve.masked(curve.value(z), images.load(mask)), y, place)

    return _by_curve(emit, 7)


@intrinsic
def _add_moments(context, x, h, w, n, valid, sums, pivot, low):
    def emit(builder, x, h, w, n, valid, sums, pivot, low):
        pivot, low = splat(builder, pivot), splat(builder, low)
        with _Sums(builder, h, w, n, sums) as pixel:
            v = pixel.images.load(x, pixel.place).at_least(low) - pivot
            pixel.add(v * pixel.images.load(valid), v)

    return lowered(emit, 6, 2)


@intrinsic
def _add_gradients(context, curve, x, grad, h, w, n, scale, shift, mask, sums, mean, low, high):
    def emit(builder, curve, x, grad, h, w, n, scale, shift, mask, sums, mean):
        mean = splat(builder, mean)
        with _Sums(builder, h, w, n, sums) as pixel:
            images = pixel.images
            v = curve.floored(images.load(x, pixel.place))
            z = v.times_plus(images.load(scale), images.load(shift))
            d = curve.gradient(z, images.load(grad, pixel.place) * images.load(mask))
            pixel.add(d, v - mean)

    return _by_curve(emit, 9, 1)


@intrinsic
def _input_gradient(context, curve, x, grad, out, n_pixels, n, scale, shift, factor, valid, slope, offset, low, high):
    def emit(builder, curve, x, grad, out, n_pixels, n, scale, shift, factor, valid, slope, offset):
        own = _Own(splat(builder, slope), splat(builder, offset), curve)
        with Loop(builder, n_pixels) as pixel, _Images(builder, n) as images:
            place = builder.mul(pixel.index, n)
            x_i = images.load(x, place)
            z = curve.floored(x_i).times_plus(images.load(scale), images.load(shift))
            d = curve.gradient(z, images.load(grad, place) * images.load(factor))
            images.store(own.add(x_i, d, images.load(valid)), out, place)

    return _by_curve(emit, 9, 2)


@intrinsic
def _activate_pool(context, curve, x, y, h, w, x_row, n, scale, shift, mask, low, high):
    def emit(builder, curve, x, y, h, w, x_row, n, scale, shift, mask):
        with Loop(builder, h) as row, Loop(builder, w) as column, _Images(builder, n) as images:
            places, place = _pool_places(builder, row.index, column.index, w, x_row, n)
            scale, shift = images.load(scale), images.load(shift)
            four = [curve.floored(images.load(x, p)).times_plus(scale, shift) for p in places]
            images.store(curve.masked(curve.largest(four).value, images.load(mask)), y, place)

    return _by_curve(emit, 9)


@intrinsic
def _add_pooled_gradients(context, curve, x, grad, h, w, x_row, n, scale, shift, mask, sums, mean, low, high):
    def emit(builder, curve, x, grad, h, w, x_row, n, scale, shift, mask, sums, mean):
        mean = splat(builder, mean)
        with _Sums(builder, h, w, n, sums) as pixel:
            images = pixel.images
            places, place = _pool_places(builder, pixel.row.index, pixel.column.index, w, x_row, n)
            values = [curve.floored(images.load(x, p)) for p in places]
            scale, shift = images.load(scale), images.load(shift)
            largest = curve.largest([v.times_plus(scale, shift) for v in values])
            d = curve.gradient(largest.z, images.load(grad, place) * images.load(mask))
            pixel.add(d, largest.of(values) - mean)

    return _by_curve(emit, 10, 1)


@intrinsic
def _pooled_input_gradient(
    context, curve, x, grad, out, h, w, x_row, n, scale, shift, factor, valid, slope, offset, low, high
):  # fmt: skip
    def emit(builder, curve, x, grad, out, h, w, x_row, n, scale, shift, factor, valid, slope, offset):
        own, zero = _Own(splat(builder, slope), splat(builder, offset), curve), constant(builder, 0.0)
        with Loop(builder, h) as row, Loop(builder, w) as column, _Images(builder, n) as images:
            places, place = _pool_places(builder, row.index, column.index, w, x_row, n)
            pixels = [images.load(x, p) for p in places]
            scale, shift, valid = (images.load(row) for row in (scale, shift, valid))
            largest = curve.largest([curve.floored(v).times_plus(scale, shift) for v in pixels])
            d = curve.gradient(largest.z, images.load(grad, place) * images.load(factor))
            shares = []
            for wins in largest.beaten[::-1]:
                shares.append(wins.choose(d, zero))
                d = wins.choose(zero, d)
            for pixel, share, p in zip(pixels, [d, *shares[::-1]], places, strict=True):
                images.store(own.add(pixel, share, valid), out, p)

    return _by_curve(emit, 11, 2)


def _by_curve(emit, n_integers, n_floats=0):
    """What an intrinsic returns whose first argument is the curve, and whose last two are the floors."""

    def emit_all(builder, curve, *arguments):
        *arguments, low, high = arguments
        is_hard_swish = builder.zext(builder.icmp_signed("==", curve, INT(int(Curve.HARD_SWISH))), INT)
        curves = {0: _Relu(splat(builder, low), splat(builder, high)), 1: _HardSwish(builder)}
        switch(builder, is_hard_swish, curves, lambda chosen: emit(builder, chosen, *arguments))

    return lowered(emit_all, n_integers + 1, n_floats + 2)


class _Largest(NamedTuple):
    """Of four numbers the largest, and for all but the first whether it beats those before."""

    z: Vectors  # before the activation
    value: Vectors  # after it
    beaten: list[Vectors]

    def of(self, four):
        """What belongs to the largest."""
        chosen = four[0]
        for wins, value in zip(self.beaten, four[1:], strict=True):
            chosen = wins.choose(value, chosen)
        return chosen


class _Relu(NamedTuple):
    """Or nothing, if both floors are out of the way."""

    low: Vectors
    high: Vectors

    def floored(self, x):
        return x.at_least(self.low)

    def floor_gradient(self, x, grad):
        return x.above(self.low).choose(grad, constant(x.builder, 0.0))

    def value(self, z):
        return z.at_least(self.high)

    def masked(self, y, mask):
        return y  # the mask is in scale and shift

    def gradient(self, z, grad):
        return z.above(self.high).choose(grad, constant(z.builder, 0.0))

    def largest(self, four):
        """The same before the activation as after it, which never falls."""
        largest, beaten = _largest(four)
        return _Largest(largest, self.value(largest), beaten)


class _HardSwish:
    """As in A. Howard et al., Searching for MobileNetV3, 2019, arXiv 1905.02244."""

    def __init__(self, builder):
        self.zero, self.half, self.one = (constant(builder, number) for number in (0.0, 0.5, 1.0))
        self.sixth, self.third = constant(builder, 1 / 6), constant(builder, 1 / 3)
        self.three, self.minus_three = constant(builder, 3.0), constant(builder, -3.0)

    def floored(self, x):
        return x

    def floor_gradient(self, x, grad):
        return grad

    def value(self, z):
        gate = z.times_plus(self.sixth, self.half).at_least(self.zero)
        return z * gate.above(self.one).choose(self.one, gate)

    def masked(self, y, mask):
        return y * mask

    def gradient(self, z, grad):
        inner = z.above(self.minus_three).choose(z.times_plus(self.third, self.half), self.zero)
        return grad * z.above(self.three).choose(self.one, inner)

    def largest(self, four):
        value, beaten = _largest([self.value(z) for z in four])
        return _Largest(_Largest(value, value, beaten).of(four), value, beaten)


class _Images(Loop):
    """The images of a pixel, STEP at a time; pixels are the loop outside, so that a map is read from end to end."""

    def __init__(self, builder, n, initial=()):
        super().__init__(builder, builder.sdiv(n, INT(STEP)), initial)

    def load(self, base, place=None):
        return load(self.builder, self._address(base, place or INT(0)))

    def store(self, vectors, base, place):
        store(self.builder, vectors, self._address(base, place))

    def _address(self, base, place):
        builder = self.builder
        return address(builder, base, builder.add(place, builder.mul(self.index, INT(STEP))))


class _Sums:
    """Pixel by pixel of a plane (H, W, N), STEP images at a time: sums of d and of d·v, stored as (2, STEP).

    Each row has its own, so that a long sum in float32 does not lose the small numbers.
    """

    def __init__(self, builder, h, w, n, sums):
        self.builder, self.sums = builder, sums
        self.row = Loop(builder, h, _zeros(builder, 2))
        self.column = Loop(builder, w, _zeros(builder, 2))
        self.w, self.n = w, n

    def __enter__(self):
        self.row.__enter__()
        self.column.__enter__()
        self.images = _Images(self.builder, self.n, self.column.values).__enter__()
        return self

    @property
    def place(self):
        """Of the pixel, counted from the plane's beginning."""
        pixel = self.builder.add(self.builder.mul(self.row.index, self.w), self.column.index)
        return self.builder.mul(pixel, self.n)

    def add(self, d, v):
        total, moment = self._pair(self.images.values)
        self.images.results = [*(total + d).values, *d.times_plus(v, moment).values]

    def __exit__(self, *error):
        self.images.__exit__(*error)
        self.column.results = self.images.finals
        self.column.__exit__(*error)
        of_rows = zip(self._pair(self.row.values), self._pair(self.column.finals), strict=True)
        self.row.results = [value for before, own in of_rows for value in (before + own).values]
        self.row.__exit__(*error)
        store(self.builder, Vectors(self.builder, self.row.finals), self.sums)

    def _pair(self, values):
        return Vectors(self.builder, values[:VECTORS]), Vectors(self.builder, values[VECTORS:])


class _Own(NamedTuple):
    """What a norm gives the gradient of its input beside d = scale·g; nothing in the padding of the batch."""

    slope: Vectors
    offset: Vectors
    curve: "_Relu | _HardSwish"

    def add(self, x, d, valid):
        own = self.curve.floored(x).times_plus(self.slope, self.offset)
        return self.curve.floor_gradient(x, own.times_plus(valid, d))


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
