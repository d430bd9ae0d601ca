"""One call runs a program: many steps, without Python, autograd or allocation in between.

Compiled once for all networks: what is particular to one is in the tables, and its numbers are in one arena.
"""

from typing import NamedTuple

import numpy as np

from nas_mnist.kernels import convolution, dropout, instructions, loss, norm_relu, optimizers, pool
from nas_mnist.kernels.affine import affine
from nas_mnist.kernels.compilation import entry_point, kernel
from nas_mnist.kernels.instructions import Curve, Mode, Op
from nas_mnist.kernels.maps import as_map, plane_size
from nas_mnist.kernels.norm_relu import LOWEST, MASK, ZERO, Activation


class Settings(NamedTuple):
    """What holds for a whole program."""

    mode: int
    batch_size: int
    n_padded: int  # the batch as it lies in memory
    valid: int  # offset in the arena of (N,): 1 for an image, 0 for padding
    gradients: int  # a parameter's gradient is so many numbers behind it
    planes: int  # from this offset on, a map has room for one channel alone
    gain: float  # of pixels, 0 to 255
    offset: float
    eps: float
    norm_momentum: float
    dropout: float
    smoothing: float
    weight_decay: float
    momentum: float


class Results(NamedTuple):
    """For each step, the sum of its losses in nats, and how many images it classified right."""

    losses: np.ndarray  # float64
    n_correct: np.ndarray  # int64


@entry_point
def run(table, activations, arena, pixels, labels, chosen, matrices, rates, settings, seed, first_step, results):
    """Steps from the `first_step` on, as many as there are `rates`: `chosen` (B·steps,) images of pixels and labels.

    `matrices` (B·steps, 2, 3) transform them, (0, 2, 3) leave them as they are. The last batch may be smaller.
    """
    valid = arena[settings.valid : settings.valid + settings.n_padded]
    for step in range(len(rates)):
        start = step * settings.batch_size
        batch = chosen[start : start + settings.batch_size]
        valid[: len(batch)], valid[len(batch) :] = 1, 0
        targets = labels[batch]
        transforms = matrices[start : start + settings.batch_size]
        state = State(batch, targets, transforms, rates[step], seed, first_step + step, step, valid)
        i = 0
        while i < len(table):
            n = table[i, instructions.SWEEP]
            if n == 0:
                _execute(table[i], activations, arena, pixels, settings, results, state, 0, 0)
            else:
                for channel in range(table[i, instructions.OUT_CHANNELS]):
                    for k in range(i, i + n):
                        _execute(table[k], activations, arena, pixels, settings, results, state, channel, 1)
            i += max(n, 1)


class State(NamedTuple):
    """What holds for one step."""

    images: np.ndarray  # (B,) of the pixels
    labels: np.ndarray  # (B,)
    matrices: np.ndarray  # (B, 2, 3)
    rate: float
    seed: int
    number: int  # of the step, since the first of the training
    row: int  # of the results
    valid: np.ndarray  # (N,)


@kernel
def _execute(row, activations, arena, pixels, settings, results, state, first, count):
    """One instruction of one step, for `count` channels from the `first` on; for all of them if that is 0."""
    op = row[instructions.OP]
    if op >= Op.SGD:
        _optimize(row, arena, settings, state.rate, state.number + 1)
        return
    x = _input(row, instructions.X, arena, settings, first, count)
    y = _output(row, instructions.Y, arena, settings, first, count)
    activation = _activation(activations, row[instructions.ACTIVATION], arena, settings)
    key = dropout.stream(state.seed, state.number, row[instructions.LAYER])
    if op >= Op.GLOBAL_POOL_BACKWARD:
        _go_back(row, arena, x, activation, settings, state, key, first, count)
    elif op == Op.AUGMENT:
        gain, offset = np.float32(settings.gain), np.float32(settings.offset)
        affine(pixels, state.images, state.matrices, gain, offset, y[0])
    elif op == Op.CONVOLVE:
        _convolve(row, arena, x, y, first, count)
    elif op == Op.MEASURE:
        drops = activations[row[instructions.ACTIVATION], instructions.DROPS] != 0
        _measure(activation, y, settings, state, key, drops, first)
    elif op == Op.ACTIVATE:
        norm_relu.activate(x, activation, first, y)
    elif op == Op.ACTIVATE_POOL:
        norm_relu.activate_pool(x, activation, first, y)
    elif op == Op.DROP_ELEMENTS:
        dropout.drop_elements(x, y, settings.dropout, key)
    elif op == Op.GLOBAL_POOL:
        pool.global_pool(x, y)
    elif op == Op.LOSS:
        grad = _input(row, instructions.GX, arena, settings, first, count)
        total, n_correct = loss.cross_entropy(x[:, 0, 0], state.labels, settings.smoothing, grad[:, 0, 0])
        results.losses[state.row], results.n_correct[state.row] = total, n_correct


@kernel
def _go_back(row, arena, x, activation, settings, state, key, first, count):
    """The gradient of one operation: of its input from that of its output, or of its weights."""
    op, n_images = row[instructions.OP], len(state.images)
    gx = _input(row, instructions.GX, arena, settings, first, count)
    gy = _output(row, instructions.GY, arena, settings, first, count)
    stride, padding, depthwise = row[instructions.STRIDE], row[instructions.PADDING], row[instructions.DEPTHWISE]
    frame = arena[row[instructions.SCRATCH] :]
    if op == Op.GLOBAL_POOL_BACKWARD:
        pool.global_pool_backward(gy, gx)
    elif op == Op.DROP_ELEMENTS_BACKWARD:
        dropout.drop_elements(gy, gx, settings.dropout, key)
    elif op == Op.ACTIVATE_POOL_BACKWARD:
        norm_relu.activate_pool_backward(x, gy, activation, first, state.valid, n_images, gx)
    elif op == Op.ACTIVATE_BACKWARD:
        norm_relu.activate_backward(x, gy, activation, first, state.valid, n_images, gx)
    elif op == Op.WEIGHT_GRADIENT:
        grad_weight = _weights(row, arena, settings.gradients, first, count)
        convolution.weight_gradient(x, gy, grad_weight, stride, padding, depthwise, frame)
        if row[instructions.BIAS] >= 0:
            start = row[instructions.BIAS] + settings.gradients + first
            convolution.bias_gradient(gy, arena[start : start + len(gy)])
    elif op == Op.INPUT_GRADIENT:
        weights = _weights(row, arena, 0, first, count)
        convolution.convolve(gy, weights, gx, stride, padding, depthwise, True, frame)


@kernel
def _convolve(row, arena, x, y, first, count):
    stride, padding, depthwise = row[instructions.STRIDE], row[instructions.PADDING], row[instructions.DEPTHWISE]
    weights, frame = _weights(row, arena, 0, first, count), arena[row[instructions.SCRATCH] :]
    convolution.convolve(x, weights, y, stride, padding, depthwise, False, frame)
    if row[instructions.BIAS] >= 0:
        start = row[instructions.BIAS] + first
        convolution.add_bias(y, arena[start : start + len(y)])


@kernel
def _measure(activation, y, settings, state, key, drops, first):
    """What the map is scaled and shifted by: dropout's masks, and batch norm's statistics."""
    momentum = settings.norm_momentum if settings.mode == Mode.TRAIN else 1 / (state.number + 1)
    for i in range(len(y)):
        c = first + i
        if drops and settings.mode == Mode.TRAIN:
            dropout.draw_mask(activation.rows[MASK, c], state.valid, settings.dropout, key, c)
        else:
            activation.rows[MASK, c] = state.valid
        if not activation.has_norm:
            norm_relu.set_mask(activation, c)
        elif settings.mode == Mode.EVALUATE:
            norm_relu.use_running(activation, c, settings.eps)
        else:
            norm_relu.measure(y[i], activation, c, state.valid, len(state.images), momentum, settings.eps)


@kernel
def _optimize(row, arena, settings, rate, n_steps):
    """A step with the optimizer: channels are rows of a matrix, or all of the parameters; out_channels its columns."""
    op, r, s = row[instructions.OP], row[instructions.CHANNELS], row[instructions.OUT_CHANNELS]
    start, state = row[instructions.WEIGHT], row[instructions.X]
    size = r * s
    weights, grad = arena[start : start + size], arena[start + settings.gradients : start + settings.gradients + size]
    first, second = arena[state : state + size], arena[state + size : state + 2 * size]
    if op == Op.SGD:
        optimizers.sgd(weights, grad, first, rate, settings.weight_decay, settings.momentum, n_steps)
    elif op == Op.ADAMW:
        optimizers.adamw(weights, grad, first, second, rate, settings.weight_decay, n_steps)
    else:
        scratch = arena[state + 2 * size : state + 4 * size].reshape(2, r, s)
        place = state + 4 * size
        factors = arena[place : place + 2 * r * r].reshape(2, r, r)
        others = arena[place + 2 * r * r : place + 2 * r * r + 2 * s * s].reshape(2, s, s)
        optimizers.soap(
            weights.reshape(r, s), grad.reshape(r, s), first.reshape(r, s), second.reshape(r, s), factors[0],
            others[0], factors[1], others[1], scratch, rate, settings.weight_decay, n_steps,
        )  # fmt: skip


@kernel
def _input(row, column, arena, settings, first, count):
    """The map (C, H, W, N) that an instruction reads, or its gradient; C is the count, if there is one."""
    c, h, w = row[instructions.CHANNELS], row[instructions.HEIGHT], row[instructions.WIDTH]
    return _map(arena, row[column], count or c, h, w, settings, first)


@kernel
def _output(row, column, arena, settings, first, count):
    c, h, w = row[instructions.OUT_CHANNELS], row[instructions.OUT_HEIGHT], row[instructions.OUT_WIDTH]
    return _map(arena, row[column], count or c, h, w, settings, first)


@kernel
def _map(arena, start, c, h, w, settings, first):
    if start < settings.planes:
        start += first * plane_size(h, w, settings.n_padded)
    return as_map(arena[start:], c, h, w, settings.n_padded)


@kernel
def _weights(row, arena, behind, first, count):
    """A convolution's weights (C', C, K, K), or what is so many numbers behind them."""
    c, k = row[instructions.CHANNELS], row[instructions.KERNEL]
    n_in, n_out = 1 if row[instructions.DEPTHWISE] else c, count or row[instructions.OUT_CHANNELS]
    start = row[instructions.WEIGHT] + behind + first * n_in * k * k
    return arena[start : start + n_out * n_in * k * k].reshape(n_out, n_in, k, k)


@kernel
def _activation(activations, index, arena, settings):
    row = activations[max(index, 0)]
    c, n, behind = row[instructions.N_CHANNELS], settings.n_padded, settings.gradients
    normed = c if row[instructions.NORM] else 0
    norm_comes_last = row[instructions.NORM] and not row[instructions.NORM_FIRST]
    low = ZERO if row[instructions.CURVE] == Curve.RELU and norm_comes_last else LOWEST
    high = ZERO if row[instructions.CURVE] == Curve.RELU and not norm_comes_last else LOWEST
    rows, statistics = row[instructions.ROWS], row[instructions.STATISTICS]
    gamma, beta = row[instructions.GAMMA], row[instructions.BETA]
    mean, variance = row[instructions.RUNNING_MEAN], row[instructions.RUNNING_VAR]
    return Activation(
        row[instructions.CURVE],
        low,
        high,
        normed > 0,
        arena[rows : rows + 4 * c * n].reshape(4, c, n),
        arena[statistics : statistics + 4 * c].reshape(4, c),
        arena[gamma : gamma + normed],
        arena[beta : beta + normed],
        arena[gamma + behind : gamma + behind + normed],
        arena[beta + behind : beta + behind + normed],
        arena[mean : mean + normed],
        arena[variance : variance + normed],
    )
