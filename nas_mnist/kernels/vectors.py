"""LLVM's vector types for kernels over maps that hold the batch innermost.

A compiler keeps the sums of a loop nest in memory, where three instructions of four are loads and stores; written so,
they stay in registers for a whole sum. The batch is what fills the vectors, so that no number of channels is awkward,
and one kernel serves every architecture.
"""

from collections.abc import Callable

from llvmlite import binding, ir
from numba import config, types

_HOST = {name for name, there in binding.get_host_cpu_features().items() if there}
_FEATURES = {name.removeprefix("+") for name in config.CPU_FEATURES.split(",")} if config.CPU_FEATURES else _HOST
WIDE = "avx512f" in _FEATURES
LANES = 16 if WIDE else 8 if "avx" in _FEATURES else 4
MANY_REGISTERS = WIDE or LANES == 4  # 32 of them, but 16 with AVX2
VECTORS = 2  # of images, beside each other
LINE = 64  # bytes of the cache
STEP = LANES * VECTORS  # images; a batch is padded to a multiple

FLOAT, INT = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)


def padded(n_images: int) -> int:
    """The images of a map that holds these: whole vectors."""
    return -(-n_images // STEP) * STEP


def lowered(emit: Callable, n_integers: int, n_floats: int = 0):
    """What an intrinsic returns: its signature, of addresses and counts, then of float32, and what emits its code."""

    def generate(context, builder, signature, arguments):
        emit(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * n_integers, *[types.float32] * n_floats), generate


class Vectors:
    """Vectors beside each other, which all take part in the same arithmetic."""

    def __init__(self, builder: ir.IRBuilder, values: list[ir.Value]):
        self.builder, self.values = builder, values

    def _with(self, operate: Callable, *others: "Vectors") -> "Vectors":
        rows = zip(self.values, *(other.values for other in others), strict=True)
        return Vectors(self.builder, [operate(*row) for row in rows])

    def __add__(self, other: "Vectors") -> "Vectors":
        return self._with(self.builder.fadd, other)

    def __sub__(self, other: "Vectors") -> "Vectors":
        return self._with(self.builder.fsub, other)

    def __mul__(self, other: "Vectors") -> "Vectors":
        return self._with(self.builder.fmul, other)

    def times_plus(self, factor: "Vectors", term: "Vectors") -> "Vectors":
        return self._with(lambda a, b, c: multiply_add(self.builder, a, b, c), factor, term)

    def above(self, other: "Vectors") -> "Vectors":
        """A bit for each number; false for a NaN."""
        return self._with(lambda a, b: self.builder.fcmp_ordered(">", a, b), other)

    def choose(self, yes: "Vectors", no: "Vectors") -> "Vectors":
        """`yes` where this has a bit, else `no`."""
        return self._with(self.builder.select, yes, no)

    def at_least(self, low: "Vectors") -> "Vectors":
        """The larger of both; NaNs are passed on."""
        return low.above(self).choose(low, self)


def splat(builder: ir.IRBuilder, value: ir.Value, n: int = VECTORS) -> Vectors:
    undefined, index = ir.Constant(VECTOR, ir.Undefined), ir.IntType(32)
    first = builder.insert_element(undefined, value, index(0))
    all_lanes = ir.Constant(ir.VectorType(index, LANES), [0] * LANES)
    return Vectors(builder, [builder.shuffle_vector(first, undefined, all_lanes)] * n)


def constant(builder: ir.IRBuilder, value: float, n: int = VECTORS) -> Vectors:
    return Vectors(builder, [ir.Constant(VECTOR, [value] * LANES)] * n)


def load(builder: ir.IRBuilder, address: ir.Value, n: int = VECTORS) -> Vectors:
    return Vectors(builder, [_load(builder, address, v * LANES) for v in range(n)])


def store(builder: ir.IRBuilder, vectors: Vectors, address: ir.Value) -> None:
    for v, value in enumerate(vectors.values):
        builder.store(value, _pointer(builder, address, v * LANES, VECTOR)).align = 4


class Loop:
    """`for index in range(n)`, n > 0, that carries vectors: `values` at its start, `results` at its end.

    `finals` are those after the loop. `place` is `index` times `step` numbers after `start`, in bytes.
    """

    def __init__(self, builder: ir.IRBuilder, n: ir.Value, initial: list[ir.Value] = ()):
        self.builder, self.n, self.initial = builder, n, initial

    def __enter__(self):
        before = self.builder.block
        self.block = self.builder.append_basic_block("loop")
        self.builder.branch(self.block)
        self.builder.position_at_end(self.block)
        self.index = self._carry(INT, INT(0), before)
        self.values = [self._carry(VECTOR, value, before) for value in self.initial]
        self.results = list(self.values)
        return self

    def _carry(self, kind, initial, block):
        phi = self.builder.phi(kind)
        phi.add_incoming(initial, block)
        return phi

    def __exit__(self, *_):
        following = self.builder.add(self.index, INT(1))
        for phi, result in zip([self.index, *self.values], [following, *self.results], strict=True):
            phi.add_incoming(result, self.builder.block)
        after = self.builder.append_basic_block("after")
        self.builder.cbranch(self.builder.icmp_signed("<", following, self.n), self.block, after)
        self.builder.position_at_end(after)
        self.finals = self.results


def switch(builder: ir.IRBuilder, key: ir.Value, cases: dict, emit: Callable) -> None:
    """Code for each of the cases, of which the one with this key is run."""
    after = builder.append_basic_block("chosen")
    chosen = builder.switch(key, after)
    for value, case in cases.items():
        block = builder.append_basic_block("case")
        chosen.add_case(INT(value), block)
        builder.position_at_end(block)
        emit(case)
        builder.branch(after)
    builder.position_at_end(after)


def address(builder: ir.IRBuilder, start: ir.Value, n: ir.Value) -> ir.Value:
    """The address of the n-th float32 after `start`."""
    return builder.add(start, builder.mul(n, INT(4)))


def load_int(builder: ir.IRBuilder, start: ir.Value, n: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(builder.add(start, builder.mul(n, INT(8))), INT.as_pointer()))


def broadcast(builder: ir.IRBuilder, start: ir.Value, n: int) -> ir.Value:
    """The n-th number after `start` in every lane."""
    return splat(builder, builder.load(_pointer(builder, start, n, FLOAT)), 1).values[0]


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    name = f"llvm.fma.v{LANES}f32"
    function = builder.module.globals.get(name)
    return builder.call(function or ir.Function(builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), name), [a, b, c])


def _pointer(builder, start, n, kind):
    return builder.inttoptr(address(builder, start, INT(n)), kind.as_pointer())


def _load(builder, start, n=0):
    value = builder.load(_pointer(builder, start, n, VECTOR))
    value.align = 4
    return value


def prefetch(builder: ir.IRBuilder, place: ir.Value, n: int) -> None:
    """Ask for the cache lines of so many vectors at this address."""
    name, kind, byte = "llvm.prefetch.p0", ir.IntType(32), ir.IntType(8).as_pointer()
    function = builder.module.globals.get(name)
    function = function or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [byte, kind, kind, kind]), name)
    for line in range(0, n * LANES * 4, LINE):
        builder.call(function, [builder.inttoptr(builder.add(place, INT(line)), byte), kind(0), kind(3), kind(1)])
