"""CPU kernels for what PyTorch does slowly on small maps, compiled once for every architecture.

PyTorch loops over the channels of a channels-last map, and 16 of them do not fill a vector register. Here a map
(B, H, W, C) is read in rows of W·C numbers, with what belongs to a channel tiled W times to go beside them: the inner
loops are long and contiguous whatever C is. Nothing is copied: the arrays are views of the tensors.
"""

import ctypes

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.nn import functional as F

LOWEST = np.float32(-3e38)  # a floor that changes nothing
ZERO = np.float32(0)
_NO_WINNER = 255
_RESERVE_BYTES = 1 << 30

# Contraction to multiply-adds is the only liberty: all of `fastmath` would lose the NaNs of a diverged network.
_kernel = njit(fastmath={"contract"}, nogil=True, cache=True, error_model="numpy")


def keep_memory() -> None:
    """Let this process keep freed memory for its next tensors.

    glibc returns a map of some MB to the system when it is freed, and each step then waits for the same pages to be
    mapped and zeroed again: a third of a training step. Nothing happens where there is no `mallopt` (macOS, Windows).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-1, _RESERVE_BYTES)  # M_TRIM_THRESHOLD
    mallopt(-3, _RESERVE_BYTES)  # M_MMAP_THRESHOLD


def norm_relu(x: Tensor, norm: nn.BatchNorm2d, mask: Tensor | None, *, norm_first: bool, pool: bool = False) -> Tensor:
    """Batch norm in training mode and ReLU, in either order, times `mask`: (B, C, H, W) → (B, C, H, W), float32.

    `mask` (B, C) scales whole channels, which is dropout's part. `pool` adds a 2×2 max-pool: (B, C, H // 2, W // 2).
    The running statistics are updated as PyTorch does. Raises `ValueError` for a single value a channel.
    """
    return _NormRelu.apply(x, norm.weight, norm.bias, norm, mask, norm_first, pool)


def max_pool(x: Tensor) -> Tensor:
    """2×2 max-pool with stride 2, an odd last row or column dropped: (B, C, H, W) → (B, C, H // 2, W // 2), float32."""
    return _MaxPool.apply(x)


def depthwise(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Depthwise convolution with stride 1: (B, C, H, W), weights (C, 1, K, K) → (B, C, H', W').

    The gradient of the input is a forward convolution with turned weights: oneDNN does that in a third of the time its
    own backward pass takes.
    """
    return _Depthwise.apply(x, weight, padding)


def affine(pixels: Tensor, matrices: Tensor, mean: float, std: float) -> Tensor:
    """Transform and normalise: pixels (B, H, W) uint8, black outside, bilinear → (B, 1, H, W) float32.

    `matrices` (B, 2, 3) lead from an output pixel to the input pixel it shows, both counted from the image's centre.
    `mean` and `std` are of pixels scaled to 0 … 1.
    """
    images = torch.empty((len(pixels), 1, *pixels.shape[1:]))
    _affine(pixels.numpy(), matrices.numpy(), np.float32(1 / (255 * std)), np.float32(mean / std), images[:, 0].numpy())
    return images


def _array(x: Tensor) -> np.ndarray:
    """The (B, H, W, C) array of a tensor (B, C, H, W); no copy if the tensor is channels-last."""
    return x.detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).numpy()


def _rows(x: Tensor) -> np.ndarray:
    """The (B, H, W·C) array of a tensor (B, C, H, W)."""
    array = _array(x)
    return array.reshape(*array.shape[:2], -1)


def _empty(b: int, c: int, h: int, w: int) -> Tensor:
    return torch.empty((b, c, h, w), memory_format=torch.channels_last)


class _NormRelu(torch.autograd.Function):
    """Both orders are one formula, max(max(x, low)·scale + shift, high), with one of the two floors out of the way."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, mask, norm_first, pool):
        b, c, h, w = x.shape
        if b * h * w == 1:
            raise ValueError(
                f"batch norm needs more than one value a channel; the input is {tuple(x.shape)}: use more images"
            )
        ctx.floors = (LOWEST, ZERO) if norm_first else (ZERO, LOWEST)
        ctx.scales = np.ones((b, c), np.float32) if mask is None else mask.numpy()
        out = _empty(b, c, h // 2, w // 2) if pool else _empty(b, c, h, w)
        ctx.winners = np.empty(_rows(out).shape if pool else (0, 0, 0), np.uint8)
        running = norm.running_mean.numpy(), norm.running_var.numpy(), norm.momentum
        norm.num_batches_tracked += 1
        parameters = weight.detach().numpy(), bias.detach().numpy()
        ctx.statistics = _norm_relu(
            _rows(x), *parameters, norm.eps, running, ctx.scales, *ctx.floors, _rows(out), ctx.winners
        )
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        out, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        arrays = _rows(out), grad_weight.numpy(), grad_bias.numpy()
        _norm_relu_backward(_rows(x), _rows(grad), ctx.statistics, ctx.scales, *ctx.floors, ctx.winners, *arrays)
        return out, grad_weight, grad_bias, None, None, None, None


@_kernel
def _norm_relu(x, weight, bias, eps, running, scales, low, high, out, winners):
    """Fill `out` and `winners`, update the running statistics, return what the gradient needs of this batch's."""
    c = weight.size
    n = x.size // c
    mean, variance = _moments(x, c, low)
    running_mean, running_var, momentum = running
    inverse_std = 1 / np.sqrt(variance + eps)
    factor = weight * inverse_std
    affine = np.empty((2, c), np.float32)
    for k in range(c):
        affine[0, k], affine[1, k] = factor[k], bias[k] - mean[k] * factor[k]
        running_mean[k] += momentum * (mean[k] - running_mean[k])
        running_var[k] += momentum * (variance[k] * n / (n - 1) - running_var[k])
    n_images, n_rows, length = x.shape
    scale = np.empty(length, np.float32)
    shift = np.empty(length, np.float32)
    upper = np.empty(length, np.float32)
    lower = np.empty(length, np.float32)
    for i in range(n_images):
        _tile(affine[0] * scales[i], scale)
        _tile(affine[1] * scales[i], shift)
        if winners.size == 0:
            for r in range(n_rows):
                _scale_shift(x[i, r], scale, shift, low, high, out[i, r])
        else:
            for r in range(n_rows // 2):
                _scale_shift(x[i, 2 * r], scale, shift, low, high, upper)
                _scale_shift(x[i, 2 * r + 1], scale, shift, low, high, lower)
                _pool_rows(upper, lower, c, high, out[i, r], winners[i, r])
    return affine, mean.astype(np.float32), inverse_std


@_kernel
def _moments(x, c, low):
    """Mean and variance (C) of max(x, low), float64.

    Float32 sums of one image are added up in float64, and counted from the first row's mean: an offset of the whole
    map would otherwise eat up the digits of the variance.
    """
    n_images, n_rows, length = x.shape
    pivot = np.empty(length, np.float32)
    sums = np.empty(length, np.float32)
    squares = np.empty(length, np.float32)
    all_sums = np.zeros(length)
    all_squares = np.zeros(length)
    _tile(_per_channel(np.maximum(x[0, 0], low), c) / (length // c), pivot)
    for i in range(n_images):
        sums[:], squares[:] = 0, 0
        for r in range(n_rows):
            for j in range(length):
                v = x[i, r, j]
                v = (low if v < low else v) - pivot[j]
                sums[j] += v
                squares[j] += v * v
        all_sums += sums
        all_squares += squares
    n = x.size // c
    shift = _per_channel(all_sums, c) / n
    return pivot[:c] + shift, np.maximum(_per_channel(all_squares, c) / n - shift * shift, 0)


@_kernel
def _scale_shift(x, scale, shift, low, high, out):
    for j in range(x.size):
        v = x[j]
        v = (low if v < low else v) * scale[j] + shift[j]
        out[j] = high if v < high else v


@_kernel
def _pool_rows(upper, lower, c, floor, out, winners):
    """The largest of four, and which it was: the first of equals, as in PyTorch; on a black background all are equal.

    No winner where the largest is at the floor: ReLU lets no gradient pass there.
    """
    for s in range(out.size // c):
        for k in range(c):
            left, right = 2 * s * c + k, (2 * s + 1) * c + k
            largest, winner = upper[left], 0
            largest, winner = (upper[right], 1) if upper[right] > largest else (largest, winner)
            largest, winner = (lower[left], 2) if lower[left] > largest else (largest, winner)
            largest, winner = (lower[right], 3) if lower[right] > largest else (largest, winner)
            out[s * c + k] = largest
            winners[s * c + k] = winner if largest > floor else _NO_WINNER


@_kernel
def _norm_relu_backward(x, grad, statistics, scales, low, high, winners, out, grad_weight, grad_bias):
    """∂/∂x = scale·(g − mean(g) − x̂·mean(g·x̂)) = scale·g + x·slope + offset, g the gradient at the norm's output."""
    affine, mean, inverse_std = statistics
    c = mean.size
    n_images, n_rows, length = x.shape
    scale = np.empty(length, np.float32)
    shift = np.empty(length, np.float32)
    factor = np.empty(length, np.float32)
    centre = np.empty(length, np.float32)
    sums = np.empty(length, np.float32)
    moments = np.empty(length, np.float32)
    all_sums, all_moments = np.zeros(length), np.zeros(length)
    _tile(affine[0], scale)
    _tile(affine[1], shift)
    _tile(mean, centre)
    for i in range(n_images):
        if winners.size > 0:
            _unpool(grad[i], winners[i], c, out[i])
        sums[:], moments[:] = 0, 0
        for r in range(n_rows):
            if winners.size == 0:
                _gate(x[i, r], grad[i, r], scale, shift, low, high, out[i, r])
            _add_gradients(x[i, r], out[i, r], centre, low, sums, moments)
        _tile(scales[i], factor)
        all_sums += sums * factor
        all_moments += moments * factor
    grad_bias[:] = _per_channel(all_sums, c)
    grad_weight[:] = _per_channel(all_moments, c) * inverse_std
    n = x.size // c
    slopes = -affine[0] * inverse_std * grad_weight / n
    slope, offset = sums, moments  # their numbers are spent
    _tile(slopes, slope)
    _tile(-affine[0] * grad_bias / n - mean * slopes, offset)
    for i in range(n_images):
        _tile(affine[0] * scales[i], factor)
        for r in range(n_rows):
            _finish_gradient(x[i, r], factor, slope, offset, low, out[i, r])


@_kernel
def _gate(x, grad, scale, shift, low, high, g):
    """The gradient at the norm's output, but for dropout."""
    for j in range(x.size):
        v, d = x[j], grad[j]
        g[j] = d if (low if v < low else v) * scale[j] + shift[j] > high else ZERO


@_kernel
def _unpool(grad, winners, c, out):
    """The same through the pool, for one image: every gradient goes to the winner of its four."""
    out[2 * len(grad) :] = 0
    length = out.shape[1]
    wide = np.zeros(length, np.float32)
    wide_winners = np.full(length, np.uint8(_NO_WINNER))
    place = np.empty(length, np.uint8)
    for j in range(length):
        place[j] = j // c % 2
    for r in range(len(grad)):
        _double_columns(grad[r], c, wide)
        _double_columns(winners[r], c, wide_winners)
        _pick(wide, wide_winners, place, out[2 * r])
        _pick(wide, wide_winners, place + np.uint8(2), out[2 * r + 1])


@_kernel
def _double_columns(row, c, wide):
    for s in range(row.size // c):
        for k in range(c):
            v = row[s * c + k]
            wide[2 * s * c + k] = v
            wide[(2 * s + 1) * c + k] = v


@_kernel
def _pick(values, winners, place, out):
    for j in range(out.size):
        v = values[j]
        out[j] = v if winners[j] == place[j] else ZERO


@_kernel
def _add_gradients(x, g, centre, low, sums, moments):
    for j in range(x.size):
        v, d = x[j], g[j]
        sums[j] += d
        moments[j] += d * ((low if v < low else v) - centre[j])


@_kernel
def _finish_gradient(x, factor, slope, offset, low, g):
    for j in range(x.size):
        v = x[j]
        d = g[j] * factor[j] + (low if v < low else v) * slope[j] + offset[j]
        g[j] = d if v > low else ZERO


@_kernel
def _tile(values, row):
    """Fill a row (W·C) with W copies of the values (C)."""
    for start in range(0, row.size, values.size):
        for k in range(values.size):
            row[start + k] = values[k]


@_kernel
def _per_channel(row, c):
    """The sums (C) of a row (W·C) over W."""
    sums = np.zeros(c)
    for j in range(row.size):
        sums[j % c] += row[j]
    return sums


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, padding=padding, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        groups, around = len(weight), weight.shape[-1] - 1 - ctx.padding
        grad_x = F.conv2d(grad, weight.flip(2, 3), padding=around, groups=groups) if ctx.needs_input_grad[0] else None
        settings = [1, 1], [ctx.padding] * 2, [1, 1], False, [0, 0], groups, [False, True, False]
        return grad_x, torch.ops.aten.convolution_backward(grad, x, weight, None, *settings)[1], None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        b, c, h, w = ctx.shape = x.shape
        out = _empty(b, c, h // 2, w // 2)
        ctx.winners = np.empty(_rows(out).shape, np.uint8)
        _max_pool(_rows(x), c, _rows(out), ctx.winners)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        out = _empty(*ctx.shape)
        _max_pool_backward(_rows(grad), ctx.winners, ctx.shape[1], _rows(out))
        return out


@_kernel
def _max_pool(x, c, out, winners):
    for i in range(out.shape[0]):
        for r in range(out.shape[1]):
            _pool_rows(x[i, 2 * r], x[i, 2 * r + 1], c, LOWEST, out[i, r], winners[i, r])


@_kernel
def _max_pool_backward(grad, winners, c, out):
    for i in range(len(grad)):
        _unpool(grad[i], winners[i], c, out[i])


@_kernel
def _affine(pixels, matrices, gain, offset, out):
    """Each image is put into a black frame, and the coordinates end there: no pixel asks whether it is outside."""
    n_images, h, w = pixels.shape
    framed = np.zeros((h + 3, w + 3), np.float32)
    half_h, half_w = np.float32((h - 1) / 2), np.float32((w - 1) / 2)
    one = np.float32(1)
    for i in range(n_images):
        framed[1 : h + 1, 1 : w + 1] = pixels[i]
        m = matrices[i]
        for r in range(h):
            y = np.float32(r) - half_h
            for s in range(w):
                x = np.float32(s) - half_w
                u = m[0, 0] * x + m[0, 1] * y + m[0, 2] + half_w + one
                v = m[1, 0] * x + m[1, 1] * y + m[1, 2] + half_h + one
                u = min(max(u, ZERO), np.float32(w + 1))
                v = min(max(v, ZERO), np.float32(h + 1))
                left, top = np.int32(u), np.int32(v)
                u -= np.float32(left)
                v -= np.float32(top)
                upper = framed[top, left] * (one - u) + framed[top, left + 1] * u
                lower = framed[top + 1, left] * (one - u) + framed[top + 1, left + 1] * u
                out[i, r, s] = (upper * (one - v) + lower * v) * gain - offset
