"""Training on a CPU: convolution, batch norm, ReLU, dropout, max-pool and augmentation, compiled once for all networks.

A map is kept as planes (C, H, W, N), the batch innermost and padded to whole vectors: every inner loop is then long,
contiguous and the same whatever the number of channels, which is too small here for PyTorch's own loops. To PyTorch
such a map is an ordinary tensor (B, C, H, W) with unusual strides; any operation takes it, and what comes in another
layout is copied. In the padding of the batch, maps are finite and gradients are zero.
"""

import ctypes
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from nas_mnist.kernels.compilation import kernel
from nas_mnist.kernels.tiles import (
    GRADIENT_OUTPUTS,
    GRADIENT_TAPS,
    LANES,
    MAX_OUTPUTS,
    SINGLE_VECTORS,
    VECTORS,
    convolution_tile,
    gradient_tile,
)

LOWEST = np.float32(-3e38)  # a floor that changes nothing
ZERO = np.float32(0)
_NO_WINNER = 4
_PLANES = "nas_mnist_planes"  # attribute of a tensor that is a map of ours: to look at strides takes ten times as long
_RESERVE_BYTES = 1 << 30
_LARGEST_FROM_HEAP = 32 << 20  # bytes; before 2.35, glibc refuses more
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# Inner loops index whole maps: a slice would be counted as a reference, which takes longer than a row of the batch.
_sum_kernel = partial(kernel, reassociate=True)


def keep_memory() -> None:
    """Let this process keep freed memory for its next tensors.

    glibc returns a map of some MB to the system when it is freed, and each step then waits for the same pages to be
    mapped and zeroed again: a third of a training step. Nothing happens where there is no `mallopt` (macOS, Windows).
    glibc adapts its thresholds by itself until one is set: where the first is refused, neither is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    if mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP):  # 1 if it is done, 0 if it is refused
        mallopt(_M_TRIM_THRESHOLD, _RESERVE_BYTES)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
    """Convolution with square kernels: (B, C, H, W) and weights (C', C, K, K) → (B, C', H', W'), float32.

    Weights (C, 1, K, K) mean a depthwise convolution where C > 1.
    """
    return _Convolution.apply(x, weight, bias, stride, padding)


def norm_relu(x: Tensor, norm: nn.BatchNorm2d, mask: Tensor | None, *, norm_first: bool, pool: bool = False) -> Tensor:
    """Batch norm in training mode and ReLU, in either order, times `mask`: (B, C, H, W) → (B, C, H, W), float32.

    `mask` (B, C) scales whole channels, which is dropout's part. `pool` adds a 2×2 max-pool: (B, C, H // 2, W // 2).
    The running statistics are updated as PyTorch does. Raises `ValueError` for a single value a channel.
    """
    return _NormRelu.apply(x, norm.weight, norm.bias, norm, mask, norm_first, pool)


def max_pool(x: Tensor) -> Tensor:
    """2×2 max-pool with stride 2, an odd last row or column dropped: (B, C, H, W) → (B, C, H // 2, W // 2), float32."""
    return _MaxPool.apply(x)


def affine(pixels: Tensor, matrices: Tensor, mean: float, std: float) -> Tensor:
    """Transform and normalise: pixels (B, H, W) uint8, black outside, bilinear → (B, 1, H, W) float32.

    `matrices` (B, 2, 3) lead from an output pixel to the input pixel it shows, both counted from the image's centre.
    `mean` and `std` are of pixels scaled to 0 … 1.
    """
    images, planes = _new_map(len(pixels), 1, *pixels.shape[1:])
    _affine(pixels.numpy(), matrices.numpy(), np.float32(1 / (255 * std)), np.float32(mean / std), planes[0])
    return images


def _padded(n_images: int) -> int:
    step = LANES * VECTORS
    return -(-n_images // step) * step


def _planes(x: Tensor) -> np.ndarray:
    """The planes (C, H, W, N) of a tensor (B, C, H, W); a copy unless it has that layout."""
    known = getattr(x, _PLANES, None)
    if known is not None:
        return known
    b, c, h, w = x.shape
    n = _padded(b)
    x = x.detach()
    strides = (1, h * w * n, w * n, n)
    fits = all(size == 1 or a == s for size, a, s in zip(x.shape, x.stride(), strides, strict=True))
    if fits and x.storage_offset() + c * h * w * n <= x.untyped_storage().nbytes() // 4:
        return x.as_strided((c, h, w, n), (*strides[1:], 1)).numpy()
    planes = torch.zeros((c, h, w, n))
    planes[..., :b] = x.permute(1, 2, 3, 0)
    return planes.numpy()


def _new_map(b: int, c: int, h: int, w: int) -> tuple[Tensor, np.ndarray]:
    """A tensor (B, C, H, W) not yet written, and its planes."""
    planes = torch.empty((c, h, w, _padded(b)))
    x, array = planes.permute(3, 0, 1, 2)[:b], planes.numpy()
    setattr(x, _PLANES, array)
    return x, array


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        b, _, h, w = x.shape
        n_out, _, k, _ = weight.shape
        ctx.save_for_backward(x, weight)
        ctx.settings = stride, padding, weight.shape[1] == 1 and x.shape[1] > 1
        ctx.has_bias = bias is not None
        out, planes = _new_map(b, n_out, (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1)
        _convolve(_planes(x), _weights(weight), planes, *ctx.settings, False)
        if ctx.has_bias:
            planes += bias.detach().numpy()[:, None, None, None]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, depthwise = ctx.settings
        grad_planes, grad_x = _planes(grad), None
        if ctx.needs_input_grad[0]:
            grad_x, planes = _new_map(*x.shape)
            _convolve(grad_planes, _weights(weight), planes, *ctx.settings, True)
        padded = _planes(x)
        if padding:
            padded = np.pad(padded, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        grad_weight = torch.empty(weight.shape)
        _convolution_gradient(padded, grad_planes, grad_weight.numpy(), stride, depthwise)
        grad_bias = torch.from_numpy(grad_planes.sum((1, 2, 3))) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _weights(weight: Tensor) -> np.ndarray:
    return weight.detach().contiguous().numpy()


@kernel
def _convolve(x, weights, out, stride, padding, depthwise, transposed):
    """The convolution, or the gradient of its input if `transposed`: then x is the gradient of its output."""
    _, h, w, n = x.shape
    n_out, out_h, out_w, _ = out.shape
    k = weights.shape[2]
    packed, size = _pack(weights, n_out, depthwise, transposed)
    n_groups, n_channels = len(packed), 1 if depthwise else len(x)
    plane, out_plane = h * w * n, out_h * out_w * n
    taps, n_taps = np.empty((out_w, k * k, 2), np.int64), np.empty(out_w, np.int64)
    for r in range(out_h):
        for s in range(out_w):
            n_taps[s] = _find_taps(taps[s], k, r, s, x.shape, stride, padding, transposed)
        for g in range(n_groups):  # outside the columns, so that what neighbours share is still in the nearest cache
            source = x.ctypes.data + 4 * g * plane * depthwise
            target = out.ctypes.data + 4 * (g * size * out_plane + r * out_w * n)
            factors = packed.ctypes.data + 4 * g * packed.shape[1]
            n_outputs = min(size, n_out - g * size)
            for s in range(out_w):
                if n_taps[s] == 0:
                    out[g * size : g * size + n_outputs, r, s] = 0
                    continue
                i = 0
                while i < n:
                    wide = np.int64(depthwise and n - i >= LANES * SINGLE_VECTORS)
                    convolution_tile(
                        n_outputs, wide, source + 4 * i, taps[s].ctypes.data, n_taps[s], n_channels, plane, factors,
                        target + 4 * (s * n + i), out_plane,
                    )  # fmt: skip
                    i += LANES * (SINGLE_VECTORS if wide else VECTORS)


@kernel
def _pack(weights, n_out, depthwise, transposed):
    """The weights in the order in which the tiles read them: group of outputs, tap, channel, output of the group."""
    k = weights.shape[2]
    n_channels = 1 if depthwise else weights.shape[0] if transposed else weights.shape[1]
    n_groups = n_out if depthwise else -(-n_out // MAX_OUTPUTS)
    size = -(-n_out // n_groups)
    packed = np.empty((n_groups, k * k * n_channels * size), np.float32)
    for g in range(n_groups):
        i = 0
        for tap in range(k * k):
            for c in range(n_channels):
                for o in range(g * size, min(g * size + size, n_out)):
                    row, column = (c, o) if transposed and not depthwise else (o, c)
                    packed[g, i] = weights[row, column, tap // k, tap % k]
                    i += 1
    return packed, size


@kernel
def _find_taps(taps, k, r, s, shape, stride, padding, transposed):
    """Fill `taps` with those that meet the map at output (r, s), and where; return how many there are."""
    _, h, w, n = shape
    n_taps = 0
    for u in range(k):
        i = _meet(r, u, h, stride, padding, transposed)
        for v in range(k):
            j = _meet(s, v, w, stride, padding, transposed)
            if i >= 0 and j >= 0:
                taps[n_taps, 0], taps[n_taps, 1] = (i * w + j) * n, u * k + v
                n_taps += 1
    return n_taps


@kernel
def _meet(r, u, h, stride, padding, transposed):
    """The row that tap row `u` reads for output row `r`; -1 if there is none."""
    if not transposed:
        i = r * stride + u - padding
    else:
        i = r + padding - u
        if i % stride != 0:
            return -1
        i //= stride
    return i if i < h else -1


@kernel
def _convolution_gradient(x, grad, grad_weight, stride, depthwise):
    """The gradient of the weights; `x` has its padding."""
    _, h, w, n = x.shape
    n_out, out_h, out_w, _ = grad.shape
    _, n_channels, k, _ = grad_weight.shape
    plane, grad_plane = h * w * n, out_h * out_w * n
    n_taps = n_channels * k * k
    taps = np.zeros(-(-n_taps // GRADIENT_TAPS) * GRADIENT_TAPS, np.int64)  # the last ones idle
    for t in range(n_taps):
        taps[t] = t // (k * k) * plane + (t // k % k * w + t % k) * n
    size = 1 if depthwise else GRADIENT_OUTPUTS
    sums = np.zeros((-(-n_out // size), taps.size // GRADIENT_TAPS, size, GRADIENT_TAPS, LANES), np.float32)
    at_once = out_w if stride == 1 else 1  # pixels of a row that are neighbours in both maps
    for r in range(out_h):
        for s in range(0, out_w, at_once):
            source, place = 4 * (r * stride * w + s * stride) * n, 4 * (r * out_w + s) * n
            for g in range(sums.shape[0]):
                for t in range(sums.shape[1]):
                    gradient_tile(
                        min(size, n_out - g * size),
                        grad.ctypes.data + 4 * g * size * grad_plane + place,
                        grad_plane,
                        x.ctypes.data + 4 * g * plane * depthwise + source,
                        taps.ctypes.data + 8 * t * GRADIENT_TAPS,
                        at_once * n,
                        sums[g, t].ctypes.data,
                    )
    for o in range(n_out):
        for t in range(n_taps):
            total = 0.0
            for lane in range(LANES):
                total += sums[o // size, t // GRADIENT_TAPS, o % size, t % GRADIENT_TAPS, lane]
            grad_weight[o, t // (k * k), t // k % k, t % k] = total


class _NormRelu(torch.autograd.Function):
    """Both orders are one formula, max(max(x, low)·scale + shift, high), with one of the two floors out of the way."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm, mask, norm_first, pool):
        b, c, h, w = x.shape
        if b * h * w == 1:
            raise ValueError(f"batch norm needs more than one value a channel, not {tuple(x.shape)}: use more images")
        ctx.floors = (LOWEST, ZERO) if norm_first else (ZERO, LOWEST)
        ctx.scales = np.zeros((c, _padded(b)), np.float32)
        ctx.scales[:, :b] = 1 if mask is None else mask.T.numpy()
        out, planes = _new_map(b, c, h // 2, w // 2) if pool else _new_map(b, c, h, w)
        ctx.winners = np.empty(planes.shape if pool else (0, 0, 0, 0), np.uint8)
        norm.num_batches_tracked += 1
        ctx.statistics = _norm_relu(
            _planes(x), b, weight.detach().numpy(), bias.detach().numpy(), norm.running_mean.numpy(),
            norm.running_var.numpy(), norm.momentum, norm.eps, ctx.scales, *ctx.floors, planes, ctx.winners,
        )  # fmt: skip
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        out, planes = _new_map(*x.shape)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
        _norm_relu_backward(
            _planes(x), len(x), _planes(grad), ctx.statistics, ctx.scales, *ctx.floors, ctx.winners,
            planes, grad_weight.numpy(), grad_bias.numpy(),
        )  # fmt: skip
        return out, grad_weight, grad_bias, None, None, None, None


@kernel
def _norm_relu(
    x, n_images, weight, bias, running_mean, running_var, momentum, eps, scales, low, high, out, winners
):  # fmt: skip
    """Fill `out` and `winners`, update the running statistics, return what the gradient needs: (4, C) float32."""
    n_channels, h, w, n = x.shape
    count = h * w * n_images
    statistics = np.empty((4, n_channels), np.float32)
    rows, out_rows = x.reshape(n_channels, h, w * n), out.reshape(n_channels, out.shape[1], out.shape[2] * n)
    scale, shift = np.empty(w * n, np.float32), np.empty(w * n, np.float32)
    for c in range(n_channels):
        mean, variance = _moments(x[c], n_images, low)
        running_mean[c] += momentum * (mean - running_mean[c])
        running_var[c] += momentum * (variance * count / (count - 1) - running_var[c])
        inverse_std = 1 / np.sqrt(variance + eps)
        factor = weight[c] * inverse_std
        offset = bias[c] - mean * factor
        statistics[0, c], statistics[1, c], statistics[2, c], statistics[3, c] = factor, offset, mean, inverse_std
        _tile(scales[c], np.float32(factor), scale)
        _tile(scales[c], np.float32(offset), shift)
        if winners.size == 0:
            for r in range(h):
                _scale_shift(rows[c, r], scale, shift, low, high, out_rows[c, r])
        else:
            _scale_shift_pool(x[c], scale, shift, low, high, out[c], winners[c])
    return statistics


@kernel
def _moments(plane, n_images, low):
    """Mean and variance of max(plane, low), float64, counted from one of its numbers.

    Without that an offset of the whole plane would eat up the digits of the variance.
    """
    h, w, n = plane.shape
    pivot = max(plane[0, 0, 0], low)
    total, total_squares = 0.0, 0.0
    for r in range(h):
        if n_images == n:
            total, total_squares = _add_moments(plane[r].reshape(w * n), pivot, low, total, total_squares)
            continue
        for s in range(w):
            total, total_squares = _add_moments(plane[r, s, :n_images], pivot, low, total, total_squares)
    count = h * w * n_images
    shift = total / count
    return pivot + shift, max(total_squares / count - shift * shift, 0.0)


@kernel
def _tile(values, factor, row):
    """Fill a row (W·N) with the values (N) times a factor, again and again."""
    for start in range(0, row.size, values.size):
        for i in range(values.size):
            row[start + i] = values[i] * factor


@_sum_kernel
def _add_moments(x, pivot, low, total, total_squares):
    """The sums, float64, with those of a row added, which are float32."""
    values, squares = ZERO, ZERO
    for i in range(x.size):
        v = x[i]
        v = (low if v < low else v) - pivot
        values += v
        squares += v * v
    return total + values, total_squares + squares


@kernel
def _scale_shift(x, scale, shift, low, high, out):
    for i in range(x.size):
        v = x[i]
        v = (low if v < low else v) * scale[i] + shift[i]
        out[i] = high if v < high else v


@kernel
def _scale_shift_pool(x, scale, shift, low, high, out, winners):
    """The largest of four, and which it was: the first of equals, as in PyTorch; on a black background all are equal.

    No winner where the largest is at the floor: ReLU lets no gradient pass there.
    """
    h, w, n = out.shape
    for r in range(h):
        for s in range(w):
            for i in range(n):
                p, q = x[2 * r, 2 * s, i], x[2 * r, 2 * s + 1, i]
                u, v = x[2 * r + 1, 2 * s, i], x[2 * r + 1, 2 * s + 1, i]
                p = (low if p < low else p) * scale[i] + shift[i]
                q = (low if q < low else q) * scale[i] + shift[i]
                u = (low if u < low else u) * scale[i] + shift[i]
                v = (low if v < low else v) * scale[i] + shift[i]
                largest, winner = (q, 1) if q > p else (p, 0)
                largest, winner = (u, 2) if u > largest else (largest, winner)
                largest, winner = (v, 3) if v > largest else (largest, winner)
                largest, winner = (largest, winner) if not largest <= high else (high, _NO_WINNER)
                out[r, s, i] = largest
                winners[r, s, i] = winner


@kernel
def _norm_relu_backward(
    x, n_images, grad, statistics, scales, low, high, winners, out, grad_weight, grad_bias
):  # fmt: skip
    """∂/∂x = scale·(g − mean(g) − x̂·mean(g·x̂)) = scale·g + x·slope + offset, g the gradient at the norm's output."""
    n_channels, h, w, n = x.shape
    count, pooled = h * w * n_images, winners.size > 0
    rows, out_rows = x.reshape(n_channels, h, w * n), out.reshape(n_channels, h, w * n)
    grad_rows = grad.reshape(n_channels, grad.shape[1], grad.shape[2] * n)
    length = n if pooled else w * n
    sums, moments, factor = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float32)
    for c in range(n_channels):
        scale, shift, mean, inverse_std = statistics[:, c]
        sums[:], moments[:] = 0, 0
        if pooled:
            _add_pooled_gradients(x[c], grad[c], winners[c], mean, low, sums, moments)
        else:
            for r in range(h):
                _add_gradients(rows[c, r], grad_rows[c, r], scale, shift, mean, low, high, sums, moments)
        total, moment = 0.0, 0.0
        for i in range(length):
            total += sums[i] * scales[c, i % n]
            moment += moments[i] * scales[c, i % n]
        grad_bias[c], grad_weight[c] = total, moment * inverse_std
        slope = np.float32(-scale * inverse_std * grad_weight[c] / count)
        offset = np.float32(-scale * total / count - mean * slope)
        _tile(scales[c], scale, factor)
        if pooled:
            _pooled_input_gradient(x[c], grad[c], winners[c], factor, slope, offset, low, out[c])
            continue
        for r in range(h):
            _input_gradient(rows[c, r], grad_rows[c, r], scale, shift, factor, slope, offset, low, high, out_rows[c, r])
    out[..., n_images:] = 0


@kernel
def _add_gradients(x, grad, scale, shift, mean, low, high, sums, moments):
    for i in range(x.size):
        v, d = x[i], grad[i]
        v = low if v < low else v
        d = d if v * scale + shift > high else ZERO
        sums[i] += d
        moments[i] += d * (v - mean)


@kernel
def _add_pooled_gradients(x, grad, winners, mean, low, sums, moments):
    h, w, n = grad.shape
    for r in range(h):
        for s in range(w):
            for i in range(n):
                winner, d = winners[r, s, i], grad[r, s, i]
                # All four are loaded: loads that depend on the winner are slow where the map is not in a cache.
                p, q = x[2 * r, 2 * s, i], x[2 * r, 2 * s + 1, i]
                u, v = x[2 * r + 1, 2 * s, i], x[2 * r + 1, 2 * s + 1, i]
                upper, lower = q if winner == 1 else p, v if winner == 3 else u
                v = lower if winner >= 2 else upper
                v = low if v < low else v
                d = d if winner < _NO_WINNER else ZERO
                sums[i] += d
                moments[i] += d * (v - mean)


@kernel
def _input_gradient(x, grad, scale, shift, factor, slope, offset, low, high, out):
    for i in range(x.size):
        x_i, d = x[i], grad[i] * factor[i]
        v = low if x_i < low else x_i
        d = d if v * scale + shift > high else ZERO
        d += v * slope + offset
        out[i] = d if x_i > low else ZERO


@kernel
def _pooled_input_gradient(x, grad, winners, factor, slope, offset, low, out):
    """An odd last row or column, which the pool does not see, has no gradient but the norm's own."""
    h, w, n = x.shape
    for r in range(h):
        for s in range(w):
            if r // 2 >= grad.shape[0] or s // 2 >= grad.shape[1]:
                for i in range(n):
                    v = x[r, s, i]
                    out[r, s, i] = v * slope + offset if v > low else ZERO
                continue
            place = r % 2 * 2 + s % 2
            for i in range(n):
                v, d = x[r, s, i], grad[r // 2, s // 2, i] * factor[i]
                d = d if winners[r // 2, s // 2, i] == place else ZERO
                d += (low if v < low else v) * slope + offset
                out[r, s, i] = d if v > low else ZERO


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        b, c, h, w = ctx.shape = x.shape
        out, planes = _new_map(b, c, h // 2, w // 2)
        ctx.winners = np.empty(planes.shape, np.uint8)
        _max_pool(_planes(x), planes, ctx.winners)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        out, planes = _new_map(*ctx.shape)
        _max_pool_backward(_planes(grad), ctx.winners, planes)
        return out


@kernel
def _max_pool(x, out, winners):
    n_channels, _, _, n = out.shape
    one, zero = np.ones(n, np.float32), np.zeros(n, np.float32)
    for c in range(n_channels):
        _scale_shift_pool(x[c], one, zero, LOWEST, LOWEST, out[c], winners[c])


@kernel
def _max_pool_backward(grad, winners, out):
    n_channels, h, w, n = grad.shape
    out[:, 2 * h :], out[:, :, 2 * w :] = 0, 0
    for c in range(n_channels):
        for r in range(2 * h):
            for s in range(2 * w):
                place = r % 2 * 2 + s % 2
                for i in range(n):
                    d = grad[c, r // 2, s // 2, i]
                    out[c, r, s, i] = d if winners[c, r // 2, s // 2, i] == place else ZERO


@kernel
def _affine(pixels, matrices, gain, offset, out):
    """Each image is put into a black frame, and the coordinates end there: no pixel asks whether it is outside."""
    n_images, h, w = pixels.shape
    out[:, :, n_images:] = 0
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
                out[r, s, i] = (upper * (one - v) + lower * v) * gain - offset
