"""Architecture → a program: a table of instructions over maps whose place in one arena is fixed.

Planned in milliseconds; nothing is compiled, because `kernels/interpreter.py` runs every program.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby

import numpy as np

from nas_mnist.kernels.instructions import ACTIVATION_COLUMNS, COLUMNS, Curve, Mode, Op
from nas_mnist.kernels.maps import LINE, plane_size
from nas_mnist.kernels.vectors import padded
from nas_mnist.model.architecture import INPUT_CHANNELS, INPUT_SIDE, Architecture, Conv, GlobalPool, LayerShape, MaxPool

NONE = -1
BACKWARD = {  # what an operation needs in a program that trains
    Op.CONVOLVE: (Op.WEIGHT_GRADIENT, Op.INPUT_GRADIENT),
    Op.ACTIVATE: (Op.ACTIVATE_BACKWARD,),
    Op.ACTIVATE_POOL: (Op.ACTIVATE_POOL_BACKWARD,),
    Op.DROP_ELEMENTS: (Op.DROP_ELEMENTS_BACKWARD,),
    Op.GLOBAL_POOL: (Op.GLOBAL_POOL_BACKWARD,),
}
CURVES = {"relu": Curve.RELU, "hardswish": Curve.HARD_SWISH}
CHANNELWISE = {Op.MEASURE, Op.ACTIVATE, Op.ACTIVATE_POOL, Op.ACTIVATE_BACKWARD, Op.ACTIVATE_POOL_BACKWARD}
IN_PLACE = {Op.ACTIVATE_BACKWARD, Op.ACTIVATE_POOL_BACKWARD}  # what may write a gradient over the map that it is of
RECOMPUTED = {Op.ACTIVATE, Op.ACTIVATE_POOL}


@dataclass(frozen=True)
class Map:
    """A map (C, H, W, N), H = W = side, made by one instruction."""

    number: int
    channels: int
    side: int
    has_gradient: bool = True  # whether anything before it has parameters


@dataclass(frozen=True)
class Filter:
    """A convolution's kernel, and where its parameters are: their names in the network."""

    weight: str
    bias: str | None
    shape: tuple[int, int, int, int]
    stride: int
    padding: int
    depthwise: bool


@dataclass(frozen=True)
class Following:
    """What follows a convolution. `norm` is the module's name in the network."""

    channels: int
    norm: str | None = None
    norm_first: bool = True
    curve: Curve = Curve.NONE
    drops: bool = False
    layer: int = 0  # dropout's number


@dataclass(frozen=True)
class Instruction:
    op: Op
    x: Map | None = None
    y: Map | None = None
    gx: Map | None = None
    gy: Map | None = None
    filter: Filter | None = None
    following: Following | None = None
    layer: int = 0
    parameters: tuple[str, ...] = ()  # of an optimizer
    matrix: tuple[int, int] = (0, 0)

    @property
    def maps(self) -> tuple[Map, ...]:
        """Those that it reads or writes."""
        return tuple(map for map in (self.x, self.y, self.gx, self.gy) if map)

    @property
    def is_channelwise(self) -> bool:
        """Whether what it does to one channel needs no other."""
        return self.op in CHANNELWISE or (self.filter is not None and self.filter.depthwise)

    @property
    def about(self) -> str:
        """The parameters it uses, by their names in the network."""
        if self.filter:
            return self.filter.weight
        if self.following:
            return self.following.norm or ""
        return (
            self.parameters[0]
            if len(self.parameters) == 1
            else f"{len(self.parameters)} arrays" * bool(self.parameters)
        )


@dataclass(frozen=True)
class Place:
    """Where an array is in the arena."""

    offset: int
    shape: tuple[int, ...]

    def of(self, arena: np.ndarray) -> np.ndarray:
        return arena[self.offset : self.offset + int(np.prod(self.shape))].reshape(self.shape)


@dataclass(frozen=True)
class Factors:
    """A matrix that SOAP trains: both moments along its bases, and both factors with their eigenvectors."""

    moments: Place  # (2, R, S): first, second
    rows: Place  # (2, R, R): factor, eigenvectors as columns
    columns: Place  # (2, S, S)


@dataclass(frozen=True)
class Plan:
    """A program: its tables for the interpreter, and where its numbers are."""

    instructions: tuple[Instruction, ...]
    sweeps: tuple[int, ...]  # how many instructions at a time are done channel by channel; 1 for all channels
    table: np.ndarray  # (instructions, COLUMNS) int64
    activations: np.ndarray  # (activations, ACTIVATION_COLUMNS) int64
    places: dict[str, Place]  # parameters and running statistics, by their names in the network
    factors: tuple[Factors, ...]
    valid: int
    gradients: int  # from a parameter to its gradient
    planes: int  # from here on a map has room for one channel alone
    size: int  # of the arena, in numbers
    n_padded: int


def plan(architecture: Architecture, batch_size: int, mode: Mode, optimizer: str | None = None) -> Plan:
    """The program of a network for batches of this size; `optimizer` (sgd, adamw, soap) if it is to be trained."""
    walk = _Walk(architecture, mode)
    forward = list(walk.forward())
    instructions = forward if mode != Mode.TRAIN else _with_backward(forward, walk.new_map)
    filters = [i.filter for i in forward if i.op == Op.CONVOLVE]
    instructions += _optimize(filters, walk.followings, optimizer) if optimizer else []
    return _Layout(instructions, walk.followings, filters, padded(batch_size)).plan()


@dataclass
class _Walk:
    """From the first layer to the last. A map whose norm and ReLU are still to be done waits with what is to follow."""

    architecture: Architecture
    mode: Mode
    followings: list[Following] = field(default_factory=list)
    waiting: Following | None = None
    n_maps: int = 0

    @property
    def curve(self) -> Curve:
        return CURVES[self.architecture.activation]

    def forward(self) -> Iterator[Instruction]:
        self.map = self.new_map(INPUT_CHANNELS, INPUT_SIDE, has_gradient=False)
        yield Instruction(Op.AUGMENT, y=self.map)
        for i, shape in enumerate(self.architecture.shapes):
            if isinstance(shape.layer, Conv):
                drops = i != self.architecture.last_conv and self.architecture.dropout > 0
                yield from self._convolution(i, shape, drops=drops)
            elif isinstance(shape.layer, MaxPool):
                yield from self._pool(shape)
            elif isinstance(shape.layer, GlobalPool):
                yield from self._finish()
                yield self._to(Op.GLOBAL_POOL, shape.channels, 1)
        yield from self._finish()
        yield Instruction(Op.LOSS, x=self.map, gx=self.map)

    def new_map(self, channels: int, side: int, *, has_gradient: bool = True) -> Map:
        self.n_maps += 1
        return Map(self.n_maps, channels, side, has_gradient)

    def _to(self, op: Op, channels: int, side: int, **operands) -> Instruction:
        """From the map to a new one."""
        x, has_gradient = self.map, self.map.has_gradient or op == Op.CONVOLVE
        self.map = self.new_map(channels, side, has_gradient=has_gradient)
        return Instruction(op, x=x, y=self.map, **operands)

    def _convolution(self, i: int, shape: LayerShape, *, drops: bool) -> Iterator[Instruction]:
        layer, c = shape.layer, shape.in_channels
        size = (layer.kernel, layer.kernel)
        if layer.separable:
            filter = Filter(f"{i}.0.weight", None, (c, 1, *size), layer.stride, layer.padding, c > 1)
            yield from self._filter(filter, shape.side)
            yield from self._follow(layer, f"{i}.1", drops=False)
            bias = f"{i}.{2 if layer.activation else 1}.bias" if layer.bias else None
            weight = f"{i}.{2 if layer.activation else 1}.weight"
            yield from self._filter(Filter(weight, bias, (layer.channels, c, 1, 1), 1, 0, False), shape.side)
            yield from self._follow(layer, f"{i}.3", drops=drops)
            return
        bias = f"{i}.0.bias" if layer.bias else None
        filter = Filter(f"{i}.0.weight", bias, (layer.channels, c, *size), layer.stride, layer.padding, False)
        yield from self._filter(filter, shape.side)
        yield from self._follow(layer, f"{i}.1", drops=drops)

    def _filter(self, filter: Filter, side: int) -> Iterator[Instruction]:
        yield from self._finish()
        yield self._to(Op.CONVOLVE, filter.shape[0], side, filter=filter)

    def _follow(self, layer: Conv, name: str, *, drops: bool) -> Iterator[Instruction]:
        if not layer.activation:
            return
        norm = f"{name}.norm" if layer.norm else None
        drops_channels = drops and not self.architecture.elementwise_dropout
        drops_elements = drops and self.architecture.elementwise_dropout and self.mode == Mode.TRAIN
        self.waiting = self._following(
            Following(self.map.channels, norm, self.architecture.norm_first, self.curve, drops_channels)
        )
        yield Instruction(Op.MEASURE, y=self.map, following=self.waiting)
        if drops_elements:
            yield from self._finish()
            yield self._to(Op.DROP_ELEMENTS, self.map.channels, self.map.side, layer=len(self.followings))

    def _following(self, following: Following) -> Following:
        self.followings.append(replace(following, layer=len(self.followings)))
        return self.followings[-1]

    def _finish(self) -> Iterator[Instruction]:
        """Do what is waiting."""
        if self.waiting:
            following, self.waiting = self.waiting, None
            yield self._to(Op.ACTIVATE, self.map.channels, self.map.side, following=following)

    def _pool(self, shape: LayerShape) -> Iterator[Instruction]:
        """Together with what is waiting, or alone."""
        following, self.waiting = self.waiting, None
        if following is None:
            following = self._following(Following(self.map.channels))
            yield Instruction(Op.MEASURE, y=self.map, following=following)
        yield self._to(Op.ACTIVATE_POOL, shape.channels, shape.side, following=following)


def _with_backward(forward: list[Instruction], new_map: Callable[[int, int], Map]) -> list[Instruction]:
    """The forward pass, the loss with its gradient, and back from there."""

    def like(map: Map) -> Map:
        return new_map(map.channels, map.side)

    *others, loss = forward
    makers = {i.y: i for i in others if i.op != Op.MEASURE}
    gy = gradient = like(loss.x)
    backward = []
    for i, instruction in reversed(list(enumerate(others))):
        if instruction.op == Op.CONVOLVE and instruction.filter.depthwise and others[i - 1].op in RECOMPUTED:
            # The input of a depthwise convolution is made again, plane by plane, instead of kept.
            instruction = replace(instruction, x=like(instruction.x))
            backward.append(replace(others[i - 1], y=instruction.x))
        for op in BACKWARD.get(instruction.op, ()):
            if op == Op.WEIGHT_GRADIENT:
                backward.append(replace(instruction, op=op, y=None, gy=gy))
            elif instruction.x.has_gradient:
                # A map that is not needed again makes room for its gradient, if that is more than a plane at a time.
                in_place = op in IN_PLACE and not makers[instruction.x].is_channelwise
                gx = instruction.x if in_place else like(instruction.x)
                backward.append(replace(instruction, op=op, y=None, gx=gx, gy=gy))
                gy = gx
    return [*others, replace(loss, gx=gradient), *backward]


def _optimize(filters: list[Filter], followings: list[Following], optimizer: str) -> list[Instruction]:
    """All parameters lie one behind another, those of the convolutions first."""
    weights, vectors = _parameters(filters, followings)
    if optimizer != "soap":
        return [Instruction(Op[optimizer.upper()], parameters=(*weights, *vectors))]
    matrices = (Instruction(Op.SOAP, parameters=(f.weight,), matrix=(f.shape[0], _size(f.shape[1:]))) for f in filters)
    return [*matrices, *([Instruction(Op.ADAMW, parameters=tuple(vectors))] if vectors else [])]


def _parameters(filters: list[Filter], followings: list[Following]) -> tuple[dict, dict]:
    """Names and shapes: of weights, and of biases and norms."""
    weights = {f.weight: f.shape for f in filters}
    vectors = {f.bias: f.shape[:1] for f in filters if f.bias}
    for following in followings:
        if following.norm:
            vectors |= {f"{following.norm}.{name}": (following.channels,) for name in ("weight", "bias")}
    return weights, vectors


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _sweeps(instructions: Sequence[Instruction]) -> list[int]:
    """How many instructions at a time are done channel by channel, so that a plane is in the cache for all of them."""
    sweeps = []
    for is_channelwise, run in groupby(instructions, lambda i: i.is_channelwise and i.maps[0].channels):
        n = len(list(run))
        sweeps += [n] if is_channelwise else [1] * n
    return sweeps


@dataclass(frozen=True)
class _Life:
    """How many numbers a map has, and the first and last instruction that needs them."""

    size: int
    first: int
    last: int


def _allocate(lives: dict[Map, _Life]) -> tuple[dict[Map, int], int]:
    """Where each map begins, and the room for all: what is no longer needed makes room for the next."""
    offsets: dict[Map, int] = {}
    end = 0
    for map, life in sorted(lives.items(), key=lambda item: item[1].first):
        others = ((offset, lives[other]) for other, offset in offsets.items())
        taken = sorted((at, at + o.size) for at, o in others if o.first <= life.last and life.first <= o.last)
        offset = 0
        for start, stop in taken:
            if offset + life.size <= start:
                break
            offset = max(offset, stop)
        offsets[map] = offset
        end = max(end, offset + life.size)
    return offsets, end


class _Layout:
    """Gives everything its place in the arena."""

    def __init__(self, instructions: list, followings: list, filters: list, n_padded: int):
        self.instructions, self.followings, self.filters, self.n = tuple(instructions), followings, filters, n_padded
        self.sweeps = _sweeps(self.instructions)
        self.end = 0
        self.places: dict[str, Place] = {}
        self.factors: list[Factors] = []

    def plan(self) -> Plan:
        weights, vectors = _parameters(self.filters, self.followings)
        for name, shape in (weights | vectors).items():  # without gaps: an optimizer takes them as one
            self.places[name] = Place(self.end, shape)
            self.end += _size(shape)
        gradients = self._take(self.end) if self.end else 0
        valid = self._take(self.n)
        activations = np.array([self._activation(f) for f in self.followings] or [[0] * len(ACTIVATION_COLUMNS)])
        self._place_maps()
        rows = [self._row(instruction) for instruction in self.instructions]  # once: an optimizer's state has one place
        for first, n in zip(accumulate(self.sweeps, initial=0), self.sweeps, strict=False):
            rows[first]["sweep"] = n if n > 1 else 0
        table = np.array([[row[column] for column in COLUMNS] for row in rows])
        return Plan(
            self.instructions,
            tuple(self.sweeps),
            table,
            activations,
            self.places,
            tuple(self.factors),
            valid,
            gradients,
            self.planes,
            self.end,
            self.n,
        )

    def _take(self, size: int) -> int:
        start = -(-self.end // LINE) * LINE
        self.end = start + size
        return start

    def _place_maps(self) -> None:
        """A map that no other sweep needs has room for one plane: each channel's takes the place of the one before."""
        sweep_of = [number for number, n in enumerate(self.sweeps) for _ in range(n)]
        uses: dict[Map, list[int]] = {}
        for i, instruction in enumerate(self.instructions):
            for map in instruction.maps:
                uses.setdefault(map, []).append(i)
        maps: dict[Map, _Life] = {}
        planes: dict[Map, _Life] = {}
        for map, used in uses.items():
            plane, first, last = plane_size.py_func(map.side, map.side, self.n), sweep_of[used[0]], sweep_of[used[-1]]
            if first == last and self.sweeps[first] > 1:
                planes[map] = _Life(plane, used[0], used[-1])
            else:
                maps[map] = _Life(map.channels * plane, first, last)
        frames = (self._frame(i, self.sweeps[sweep_of[at]] > 1) for at, i in enumerate(self.instructions))
        self.frame = self._take(max(frames))
        self.offsets = self._take_maps(maps)
        self.planes = self._take(0)
        self.offsets |= self._take_maps(planes)

    def _take_maps(self, lives: dict[Map, _Life]) -> dict[Map, int]:
        offsets, size = _allocate(lives)
        start = self._take(size)
        return {map: start + offset for map, offset in offsets.items()}

    def _frame(self, instruction: Instruction, one_plane: bool) -> int:
        """The room for a map with a border: a weight gradient's input, a plane of a depthwise convolution's."""
        filter = instruction.filter
        if filter is None or not (filter.depthwise or instruction.op == Op.WEIGHT_GRADIENT):
            return 0
        if instruction.op == Op.INPUT_GRADIENT:
            map, channels, border = instruction.gy, 1, filter.shape[2] - 1 - filter.padding
        else:
            map, border = instruction.x, filter.padding
            channels = map.channels if instruction.op == Op.WEIGHT_GRADIENT and not one_plane else 1
        side = map.side + 2 * border
        return channels * plane_size.py_func(side, side, self.n) if border else 0

    def _activation(self, following: Following) -> list[int]:
        c = following.channels
        row = dict.fromkeys(ACTIVATION_COLUMNS, 0) | {
            "norm": following.norm is not None,
            "norm_first": following.norm_first,
            "curve": following.curve,
            "drops": following.drops,
            "layer": following.layer,
            "n_channels": c,
            "rows": self._take(4 * c * self.n),
            "statistics": self._take(4 * c),
        }
        if following.norm:
            row |= {"gamma": self.places[f"{following.norm}.weight"].offset}
            row |= {"beta": self.places[f"{following.norm}.bias"].offset}
            for name in ("running_mean", "running_var"):
                self.places[f"{following.norm}.{name}"] = Place(self._take(c), (c,))
                row[name] = self.places[f"{following.norm}.{name}"].offset
        return [int(row[column]) for column in ACTIVATION_COLUMNS]

    def _row(self, instruction: Instruction) -> dict[str, int]:
        row = dict.fromkeys(COLUMNS, 0) | {"op": int(instruction.op), "scratch": self.frame, "bias": NONE}
        row["layer"] = instruction.following.layer if instruction.following else instruction.layer
        row["activation"] = instruction.following.layer if instruction.following else NONE
        for name in ("x", "y", "gx", "gy"):
            map = getattr(instruction, name)
            if map:
                prefix = "out_" if name in ("y", "gy") else ""
                row[name] = self.offsets[map]
                row |= {f"{prefix}channels": map.channels, f"{prefix}height": map.side, f"{prefix}width": map.side}
        if instruction.filter:
            row |= self._filter(instruction.filter)
        if instruction.parameters:
            row |= self._optimizer(instruction)
        return row

    def _filter(self, filter: Filter) -> dict[str, int]:
        return {
            "kernel": filter.shape[2],
            "stride": filter.stride,
            "padding": filter.padding,
            "depthwise": int(filter.depthwise),
            "weight": self.places[filter.weight].offset,
            "bias": self.places[filter.bias].offset if filter.bias else NONE,
        }

    def _optimizer(self, instruction: Instruction) -> dict[str, int]:
        places = [self.places[name] for name in instruction.parameters]
        r, s = instruction.matrix if instruction.op == Op.SOAP else (sum(_size(place.shape) for place in places), 1)
        size = r * s
        if instruction.op == Op.SOAP:
            state = self._take(4 * size + 2 * r * r + 2 * s * s)
            rows = state + 4 * size
            columns = rows + 2 * r * r
            self.factors.append(Factors(Place(state, (2, r, s)), Place(rows, (2, r, r)), Place(columns, (2, s, s))))
        else:
            state = self._take(2 * size)
        return {"weight": places[0].offset, "x": state, "channels": r, "out_channels": s}
