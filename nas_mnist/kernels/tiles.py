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
SINGLE_VECTORS = (8, 4)  # in a tile of one output, as a depthwise convolution has: enough sums to hide the latency
GRADIENT_OUTPUTS, GRADIENT_TAPS = (4, 6) if MANY_REGISTERS else (3, 3)
DEPTHWISE_TAPS = 9  # of one output
AHEAD = 256  # bytes; a tile reads a line each of many maps, more than the processor foresees by itself


@intrinsic
def convolution_tile(context, n_outputs, n_vectors, x, taps, n_taps, n_channels, plane, weights, out, out_plane):
    """out[o, n] = Σ over taps and channels of x[channel, tap, n] · weights[tap, channel, o].

    All are addresses or counts. `taps` points to pairs: where the tap's pixels begin, counted in numbers from `x`, and
    which tap of the kernel it is. `plane` and `out_plane` are the numbers of one channel. n goes over `n_vectors`
    vectors, o over `n_outputs`: VECTORS and up to MAX_OUTPUTS, or one of SINGLE_VECTORS and 1.
    """

    def emit(builder, n_outputs, n_vectors, *rest):
        many = builder.icmp_signed(">", n_vectors, INT(VECTORS))
        key = builder.select(many, builder.mul(n_vectors, INT(-1)), n_outputs)
        shapes = {-n: (1, n) for n in SINGLE_VECTORS} | {n: (n, VECTORS) for n in range(1, MAX_OUTPUTS + 1)}
        switch(builder, key, shapes, lambda shape: _emit_convolution(builder, *shape, *rest))

    return lowered(emit, 10)


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


def _emit_convolution(builder, n_outputs, n_vectors, x, taps, n_taps, n_channels, plane, weights, out, out_plane):
    zeros = constant(builder, 0.0, n_outputs * n_vectors).values
    tap_weights = builder.mul(n_channels, INT(n_outputs))
    with Loop(builder, n_taps, zeros) as outer:
        pair = builder.mul(outer.index, INT(2))
        pixels = address(builder, x, load_int(builder, taps, pair))
        tap = load_int(builder, taps, builder.add(pair, INT(1)))
        weight = address(builder, weights, builder.mul(tap, tap_weights))
        with Loop(builder, n_channels, outer.values) as inner:
            source = address(builder, pixels, builder.mul(inner.index, plane))
            factors = address(builder, weight, builder.mul(inner.index, INT(n_outputs)))
            images = load(builder, source, n_vectors).values
            prefetch(builder, builder.add(source, INT(AHEAD)), n_vectors)
            for o in range(n_outputs):
                factor = broadcast(builder, factors, o)
                for v in range(n_vectors):
                    k = o * n_vectors + v
                    inner.results[k] = multiply_add(builder, images[v], factor, inner.values[k])
        outer.results = inner.finals
    for o in range(n_outputs):
        row = address(builder, out, builder.mul(out_plane, INT(o)))
        store(builder, Vectors(builder, outer.finals[o * n_vectors : (o + 1) * n_vectors]), row)


def _emit_gradient(builder, n_outputs, n_taps, grad, grad_plane, x, taps, n, sums):
    sources = [address(builder, x, load_int(builder, taps, INT(t))) for t in range(n_taps)]
    rows = [address(builder, grad, builder.mul(grad_plane, INT(o))) for o in range(n_outputs)]
    before = load(builder, sums, n_outputs * n_taps).values
    with Loop(builder, builder.sdiv(n, INT(LANES)), before) as loop:
        place = builder.mul(loop.index, INT(LANES))
        pixels = [load(builder, address(builder, source, place), 1).values[0] for source in sources]
        for o in range(n_outputs):
            gradient = load(builder, address(builder, rows[o], place), 1).values[0]
            for t in range(n_taps):
                k = o * n_taps + t
                loop.results[k] = multiply_add(builder, gradient, pixels[t], loop.values[k])
    store(builder, Vectors(builder, loop.finals), sums)
