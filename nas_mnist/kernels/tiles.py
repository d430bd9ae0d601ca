"""The inner loops of a convolution over maps that hold the batch innermost, in LLVM's vector types.

A compiler keeps the sums of a tile in memory, where three instructions of four are loads and stores; here they stay in
registers for a whole sum. The batch is what fills the vectors, so that no number of channels is awkward, and one tile
serves every architecture. About 200 GFLOP/s a core with AVX-512, where oneDNN gets 20 to 150 from so few channels.
"""

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features()
_WIDE = _FEATURES.get("avx512f", False)
LANES = 16 if _WIDE else 8 if _FEATURES.get("avx", False) else 4
# Tiles that fit the registers: 32 of them, but 16 with AVX2.
_MANY_REGISTERS = _WIDE or LANES == 4
MAX_OUTPUTS = 8 if _MANY_REGISTERS else 6
VECTORS = 2  # of images, beside each other in a tile
SINGLE_VECTORS = 8  # in a tile of one output, as a depthwise convolution has: enough sums to hide the latency
GRADIENT_OUTPUTS, GRADIENT_TAPS = (4, 6) if _MANY_REGISTERS else (3, 3)

_FLOAT, _INT = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)


@intrinsic
def convolution_tile(context, n_outputs, wide, x, taps, n_taps, n_channels, plane, weights, out, out_plane):
    """out[o, n] = Σ over taps and channels of x[channel, tap, n] · weights[tap, channel, o].

    All are addresses or counts. `taps` points to pairs: where the tap's pixels begin, counted in numbers from `x`, and
    which tap of the kernel it is. `plane` and `out_plane` are the numbers of one channel. n goes over VECTORS vectors,
    o over `n_outputs`; if `wide`, over SINGLE_VECTORS vectors and the one output.
    """

    def generate(context, builder, signature, arguments):
        n_outputs, wide, *rest = arguments
        key = builder.select(builder.icmp_signed("!=", wide, _INT(0)), _INT(0), n_outputs)
        shapes = {0: (1, SINGLE_VECTORS)} | {n: (n, VECTORS) for n in range(1, MAX_OUTPUTS + 1)}
        _switch(builder, key, shapes, lambda shape: _emit_convolution(builder, *shape, *rest))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 10), generate


@intrinsic
def gradient_tile(context, n_outputs, grad, grad_plane, x, taps, n, sums):
    """sums[o, t, lane] += Σ over n of grad[o, n] · x[taps[t] + n], n in steps of LANES; t goes over GRADIENT_TAPS."""

    def generate(context, builder, signature, arguments):
        n_outputs, *rest = arguments
        sizes = {n: n for n in range(1, GRADIENT_OUTPUTS + 1)}
        _switch(builder, n_outputs, sizes, lambda size: _emit_gradient(builder, size, *rest))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


def _emit_convolution(builder, n_outputs, n_vectors, x, taps, n_taps, n_channels, plane, weights, out, out_plane):
    zeros = [_ZERO] * (n_outputs * n_vectors)
    tap_weights = builder.mul(n_channels, _INT(n_outputs))
    with _Loop(builder, n_taps, zeros) as outer:
        pair = builder.mul(outer.index, _INT(2))
        pixels = _address(builder, x, _load_int(builder, taps, pair))
        tap = _load_int(builder, taps, builder.add(pair, _INT(1)))
        weight = _address(builder, weights, builder.mul(tap, tap_weights))
        with _Loop(builder, n_channels, outer.values) as inner:
            source = _address(builder, pixels, builder.mul(inner.index, plane))
            factors = _address(builder, weight, builder.mul(inner.index, _INT(n_outputs)))
            images = [_load(builder, source, v * LANES) for v in range(n_vectors)]
            for o in range(n_outputs):
                factor = _broadcast(builder, factors, o)
                for v in range(n_vectors):
                    k = o * n_vectors + v
                    inner.results[k] = _multiply_add(builder, images[v], factor, inner.values[k])
        outer.results = inner.finals
    for o in range(n_outputs):
        row = _address(builder, out, builder.mul(out_plane, _INT(o)))
        for v in range(n_vectors):
            _store(builder, outer.finals[o * n_vectors + v], row, v * LANES)


def _emit_gradient(builder, n_outputs, grad, grad_plane, x, taps, n, sums):
    sources = [_address(builder, x, _load_int(builder, taps, _INT(t))) for t in range(GRADIENT_TAPS)]
    rows = [_address(builder, grad, builder.mul(grad_plane, _INT(o))) for o in range(n_outputs)]
    before = [_load(builder, sums, k * LANES) for k in range(n_outputs * GRADIENT_TAPS)]
    with _Loop(builder, builder.sdiv(n, _INT(LANES)), before) as loop:
        place = builder.mul(loop.index, _INT(LANES))
        pixels = [_load(builder, _address(builder, source, place)) for source in sources]
        for o in range(n_outputs):
            gradient = _load(builder, _address(builder, rows[o], place))
            for t in range(GRADIENT_TAPS):
                k = o * GRADIENT_TAPS + t
                loop.results[k] = _multiply_add(builder, gradient, pixels[t], loop.values[k])
    for k, final in enumerate(loop.finals):
        _store(builder, final, sums, k * LANES)


class _Loop:
    """`for index in range(n)`, n > 0, that carries vectors: `values` at its start, `results` at its end.

    `finals` are those after the loop.
    """

    def __init__(self, builder, n, initial):
        self.builder, self.n, self.initial = builder, n, initial

    def __enter__(self):
        before = self.builder.block
        self.block = self.builder.append_basic_block("loop")
        self.builder.branch(self.block)
        self.builder.position_at_end(self.block)
        self.index = self._carry(_INT, _INT(0), before)
        self.values = [self._carry(_VECTOR, value, before) for value in self.initial]
        self.results = list(self.values)
        return self

    def _carry(self, kind, initial, block):
        phi = self.builder.phi(kind)
        phi.add_incoming(initial, block)
        return phi

    def __exit__(self, *_):
        following = self.builder.add(self.index, _INT(1))
        for phi, result in zip([self.index, *self.values], [following, *self.results], strict=True):
            phi.add_incoming(result, self.builder.block)
        after = self.builder.append_basic_block("after")
        self.builder.cbranch(self.builder.icmp_signed("<", following, self.n), self.block, after)
        self.builder.position_at_end(after)
        self.finals = self.results


def _switch(builder, key, cases, emit) -> None:
    after = builder.append_basic_block("chosen")
    switch = builder.switch(key, after)
    for value, case in cases.items():
        block = builder.append_basic_block("case")
        switch.add_case(_INT(value), block)
        builder.position_at_end(block)
        emit(case)
        builder.branch(after)
    builder.position_at_end(after)


def _address(builder, start, n):
    """The address of the n-th float32 after `start`."""
    return builder.add(start, builder.mul(n, _INT(4)))


def _pointer(builder, address, n, kind):
    return builder.inttoptr(_address(builder, address, _INT(n)), kind.as_pointer())


def _load(builder, address, n=0):
    value = builder.load(_pointer(builder, address, n, _VECTOR))
    value.align = 4
    return value


def _store(builder, value, address, n) -> None:
    builder.store(value, _pointer(builder, address, n, _VECTOR)).align = 4


def _load_int(builder, address, n):
    return builder.load(builder.inttoptr(builder.add(address, builder.mul(n, _INT(8))), _INT.as_pointer()))


def _broadcast(builder, address, n):
    undefined, index = ir.Constant(_VECTOR, ir.Undefined), ir.IntType(32)
    first = builder.insert_element(undefined, builder.load(_pointer(builder, address, n, _FLOAT)), index(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, LANES), [0] * LANES))


def _multiply_add(builder, a, b, c):
    name = f"llvm.fma.v{LANES}f32"
    function = builder.module.globals.get(name)
    return builder.call(
        function or ir.Function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name), [a, b, c]
    )
