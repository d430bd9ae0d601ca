"""The inner loops of a convolution and of its gradients.

About 200 GFLOP/s a core with AVX-512, where oneDNN gets 20 to 150 from so few channels.
"""

from numba.extending import intrinsic

from nas_mnist.kernels.vectors import (
    INT,
    LANES,
    MANY_REGISTERS,
    VECTORS,
    Loop,
    Vectors,
    address,
    broadcast,
    constant,
    load,
    load_int,
    lowered,
    multiply_add,
    prefetch,
    store,
    switch,
)

MAX_OUTPUTS = 8 if MANY_REGISTERS else 6  # of a tile that fits the registers
GRADIENT_OUTPUTS, GRADIENT_TAPS = (4, 6) if MANY_REGISTERS else (4, 3)
DEPTHWISE_TAPS = 9  # of one output
DEPTHWISE_ROWS = 4  # of the output at a time: with the taps, as many vectors as fit the registers
AHEAD = 256  # bytes; a tile reads a line each of many maps, more than the processor foresees by itself


@intrinsic
def convolution_tile(context, n_outputs, x, taps, n_taps, n_channels, plane, weights, out, out_plane):
    """out[o, n] = Σ over taps and channels of x[channel, tap, n] · weights[tap, channel, o].

    All are addresses or counts. `taps` points to pairs: where the tap's pixels begin, counted in numbers from `x`, and
    which tap of the kernel it is. `plane` and `out_plane` are the numbers of one channel. n goes over STEP images, o
    over up to MAX_OUTPUTS.
    """

    def emit(builder, n_outputs, *rest):
        shapes = {n: n for n in range(1, MAX_OUTPUTS + 1)}
        switch(builder, n_outputs, shapes, lambda n: _emit_convolution(builder, n, *rest))

    return lowered(emit, 9)


@intrinsic
def gradient_tile(context, n_outputs, n_taps, grad, grad_plane, x, taps, n, sums):
    """sums[o, t, lane] += Σ over n of grad[o, n] · x[taps[t] + n], n in steps of LANES.

    o goes over up to GRADIENT_OUTPUTS, t over GRADIENT_TAPS; or over 1 and DEPTHWISE_TAPS.
    """

    def emit(builder, n_outputs, n_taps, *rest):
        key = builder.select(builder.icmp_signed("==", n_taps, INT(DEPTHWISE_TAPS)), INT(0), n_outputs)
        shapes = {n: (n, GRADIENT_TAPS) for n in range(1, GRADIENT_OUTPUTS + 1)} | {0: (1, DEPTHWISE_TAPS)}
        switch(builder, key, shapes, lambda shape: _emit_gradient(builder, *shape, *rest))

    return lowered(emit, 8)


@intrinsic
def depthwise_tile(context, n_rows, x, x_row, n, weights, out, out_row, length):
    """out[r, i] = Σ over u, v of x[r + u, i + v·n] · weights[u, v], of a 3×3 kernel with a stride of 1.

    x and out are addresses, their rows so many numbers apart; a pixel has `n` numbers. i goes over `length` numbers, a
    multiple of LANES, r over up to DEPTHWISE_ROWS: what is loaded once is part of as many outputs as it can be.
    """

    def emit(builder, n_rows, *rest):
        shapes = {rows: rows for rows in range(1, DEPTHWISE_ROWS + 1)}
        switch(builder, n_rows, shapes, lambda rows: _emit_depthwise(builder, rows, *rest))

    return lowered(emit, 8)


@intrinsic
def copy(context, source, target, n):
    """`n` numbers, a multiple of LANES, from one address to another."""

    def emit(builder, source, target, n):
        with Loop(builder, builder.sdiv(n, INT(LANES))) as loop:
            place = builder.mul(loop.index, INT(LANES))
            store(builder, load(builder, address(builder, source, place), 1), address(builder, target, place))

    return lowered(emit, 3)


@intrinsic
def clear(context, target, n):
    """Zeros, a multiple of LANES of them, at an address."""

    def emit(builder, target, n):
        with Loop(builder, builder.sdiv(n, INT(LANES))) as loop:
            place = builder.mul(loop.index, INT(LANES))
            store(builder, constant(builder, 0.0, 1), address(builder, target, place))

    return lowered(emit, 2)


def _emit_depthwise(builder, n_rows, x, x_row, n, weights, out, out_row, length):
    factors = [broadcast(builder, weights, t) for t in range(DEPTHWISE_TAPS)]
    sources = [address(builder, x, builder.mul(x_row, INT(u))) for u in range(n_rows + 2)]
    rows = [address(builder, out, builder.mul(out_row, INT(r))) for r in range(n_rows)]
    with Loop(builder, builder.sdiv(length, INT(LANES))) as loop:
        place = builder.mul(loop.index, INT(LANES))
        sums = [constant(builder, 0.0, 1).values[0]] * n_rows
        for u in range(n_rows + 2):
            for v in range(3):
                beside = builder.add(place, builder.mul(n, INT(v)))
                pixel = load(builder, address(builder, sources[u], beside), 1).values[0]
                for r in range(max(0, u - 2), min(n_rows, u + 1)):
                    sums[r] = multiply_add(builder, pixel, factors[3 * (u - r) + v], sums[r])
        for r in range(n_rows):
            store(builder, Vectors(builder, [sums[r]]), address(builder, rows[r], place))


def _emit_convolution(builder, n_outputs, x, taps, n_taps, n_channels, plane, weights, out, out_plane):
    zeros = constant(builder, 0.0, n_outputs * VECTORS).values
    tap_weights = builder.mul(n_channels, INT(n_outputs))
    with Loop(builder, n_taps, zeros) as outer:
        pair = builder.mul(outer.index, INT(2))
        pixels = address(builder, x, load_int(builder, taps, pair))
        tap = load_int(builder, taps, builder.add(pair, INT(1)))
        weight = address(builder, weights, builder.mul(tap, tap_weights))
        with Loop(builder, n_channels, outer.values) as inner:
            source = address(builder, pixels, builder.mul(inner.index, plane))
            factors = address(builder, weight, builder.mul(inner.index, INT(n_outputs)))
            images = load(builder, source).values
            prefetch(builder, builder.add(source, INT(AHEAD)), VECTORS)
            for o in range(n_outputs):
                factor = broadcast(builder, factors, o)
                for v in range(VECTORS):
                    k = o * VECTORS + v
                    inner.results[k] = multiply_add(builder, images[v], factor, inner.values[k])
        outer.results = inner.finals
    for o in range(n_outputs):
        row = address(builder, out, builder.mul(out_plane, INT(o)))
        store(builder, Vectors(builder, outer.finals[o * VECTORS : (o + 1) * VECTORS]), row)


def _emit_gradient(builder, n_outputs, n_taps, grad, grad_plane, x, taps, n, sums):
    sources = [address(builder, x, load_int(builder, taps, INT(t))) for t in range(n_taps)]
    rows = [address(builder, grad, builder.mul(grad_plane, INT(o))) for o in range(n_outputs)]
    zeros = constant(builder, 0.0, n_outputs * n_taps).values
    with Loop(builder, builder.sdiv(n, INT(LANES)), zeros) as loop:
        place = builder.mul(loop.index, INT(LANES))
        pixels = [load(builder, address(builder, source, place), 1).values[0] for source in sources]
        for o in range(n_outputs):
            gradient = load(builder, address(builder, rows[o], place), 1).values[0]
            for t in range(n_taps):
                k = o * n_taps + t
                loop.results[k] = multiply_add(builder, gradient, pixels[t], loop.values[k])
    # A row by itself: a long sum in float32 loses the small numbers.
    store(builder, load(builder, sums, n_outputs * n_taps) + Vectors(builder, loop.finals), sums)
