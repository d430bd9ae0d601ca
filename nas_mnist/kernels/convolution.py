"""Convolution of maps (C, H, W, N) with square kernels, its input's and its weights' gradient; depthwise ones too."""

import numpy as np

from nas_mnist.kernels.compilation import kernel
from nas_mnist.kernels.maps import as_map, plane_stride
from nas_mnist.kernels.tiles import (
    DEPTHWISE_ROWS,
    DEPTHWISE_TAPS,
    GRADIENT_OUTPUTS,
    GRADIENT_TAPS,
    MAX_OUTPUTS,
    clear,
    convolution_tile,
    copy,
    depthwise_tile,
    gradient_tile,
)
from nas_mnist.kernels.vectors import LANES, STEP

# Inner loops index whole maps: a slice would be counted as a reference, which takes longer than a row of the batch.


@kernel
def convolve(x, weights, out, stride, padding, depthwise, transposed, frame):
    """The convolution, or the gradient of its input if `transposed`: then x is the gradient of its output.

    Weights (C', C, K, K); if `depthwise`, (C, 1, K, K), and `frame` has room for a plane of x with a border of K - 1.
    """
    if depthwise and stride == 1 and weights.shape[2] == 3 and padding < 3:
        _convolve_depthwise(x, weights, out, padding, transposed, frame)
        return
    n_out, out_h, out_w, n = out.shape
    k = weights.shape[2]
    packed, size = pack(weights, n_out, depthwise, transposed)
    taps, n_taps = np.empty((out_w, k * k, 2), np.int64), np.empty(out_w, np.int64)
    inner = -1  # a row whose taps all meet the map: with a stride of 1 they are those of all such rows
    for r in range(out_h):
        is_inner = stride == 1 and _is_inner(r, k, x.shape[1], padding, transposed)
        if not is_inner or inner < 0:
            inner = r if is_inner else -1
            for s in range(out_w):
                n_taps[s] = _find_taps(taps[s], k, r, s, x.shape, stride, padding, transposed)
        shift = 4 * (r - inner) * x.shape[2] * n if is_inner else 0
        for g in range(len(packed)):  # outside the columns, so that what neighbours share stays in the nearest cache
            n_outputs = min(size, n_out - g * size)
            source = x[g * depthwise].ctypes.data + shift
            _convolve_row(
                source, plane_stride(x), 1 if depthwise else len(x), taps, n_taps, packed[g].ctypes.data,
                out, g * size, n_outputs, r,
            )  # fmt: skip


@kernel
def _convolve_depthwise(x, weights, out, padding, transposed, frame):
    """The same, a plane at a time, for 3×3 kernels and a stride of 1."""
    _, out_h, out_w, n = out.shape
    taps = np.empty(DEPTHWISE_TAPS, np.float32)
    for c in range(len(out)):
        plane = _framed(x[c : c + 1], 2 - padding if transposed else padding, frame)
        for t in range(DEPTHWISE_TAPS):
            tap = DEPTHWISE_TAPS - 1 - t if transposed else t
            taps[t] = weights[c, 0, tap // 3, tap % 3]
        for r in range(0, out_h, DEPTHWISE_ROWS):
            depthwise_tile(
                min(DEPTHWISE_ROWS, out_h - r), plane[0, r].ctypes.data, plane.shape[2] * n, n, taps.ctypes.data,
                out[c, r].ctypes.data, out_w * n, out_w * n,
            )  # fmt: skip


@kernel
def _convolve_row(x, plane, n_channels, taps, n_taps, factors, out, first, n_outputs, r):
    """Row `r` of the output's channels from the `first`; x and factors are addresses."""
    _, _, out_w, n = out.shape
    for s in range(out_w):
        if n_taps[s] == 0:
            out[first : first + n_outputs, r, s] = 0
            continue
        for i in range(0, n, STEP):
            convolution_tile(
                n_outputs, x + 4 * i, taps[s].ctypes.data, n_taps[s], n_channels, plane, factors,
                out[first, r, s].ctypes.data + 4 * i, plane_stride(out),
            )  # fmt: skip


@kernel
def pack(weights, n_out, depthwise, transposed):
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
def _is_inner(r, k, h, padding, transposed):
    """Whether every row of taps reads a row of the map for output row `r`, with a stride of 1."""
    first, last = _meet(r, 0, h, 1, padding, transposed), _meet(r, k - 1, h, 1, padding, transposed)
    return first >= 0 and last >= 0


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
def weight_gradient(x, grad, grad_weight, stride, padding, depthwise, frame):
    """The gradient of the weights from the input (C, H, W, N) and the gradient of the output (C', H', W', N).

    `frame` has room for the input with its padding.
    """
    x = _framed(x, padding, frame)
    _, _, w, n = x.shape
    n_out, out_h, out_w, _ = grad.shape
    _, n_channels, k, _ = grad_weight.shape
    plane, grad_plane = plane_stride(x), plane_stride(grad)
    n_taps = n_channels * k * k
    tile_taps = DEPTHWISE_TAPS if depthwise and n_taps > GRADIENT_TAPS else GRADIENT_TAPS
    taps = np.zeros(-(-n_taps // tile_taps) * tile_taps, np.int64)  # the last ones idle
    for t in range(n_taps):
        taps[t] = t // (k * k) * plane + (t // k % k * w + t % k) * n
    size = 1 if depthwise else GRADIENT_OUTPUTS
    sums = np.zeros((-(-n_out // size), taps.size // tile_taps, size * tile_taps * LANES), np.float32)
    at_once = out_w if stride == 1 else 1  # pixels of a row that are neighbours in both maps
    for r in range(out_h):
        for s in range(0, out_w, at_once):
            source, place = 4 * (r * stride * w + s * stride) * n, 4 * (r * out_w + s) * n
            for g in range(sums.shape[0]):
                for t in range(sums.shape[1]):
                    gradient_tile(
                        min(size, n_out - g * size), tile_taps, grad.ctypes.data + 4 * g * size * grad_plane + place,
                        grad_plane, x.ctypes.data + 4 * g * plane * depthwise + source,
                        taps.ctypes.data + 8 * t * tile_taps, at_once * n, sums[g, t].ctypes.data,
                    )  # fmt: skip
    add_lanes(sums, size, tile_taps, grad_weight.reshape(n_out, n_taps))


@kernel
def _framed(x, padding, frame):
    """The map with `padding` zeros around each plane; the map itself if there is no padding."""
    if padding == 0:
        return x
    c, h, w, n = x.shape
    framed = as_map(frame, c, h + 2 * padding, w + 2 * padding, n)
    row, edge = (w + 2 * padding) * n, padding * n
    for channel in range(c):
        for r in range(h + 2 * padding):
            start = framed[channel, r].ctypes.data
            if r < padding or r >= h + padding:
                clear(start, row)
                continue
            clear(start, edge)
            copy(x[channel, r - padding].ctypes.data, start + 4 * edge, w * n)
            clear(start + 4 * (edge + w * n), edge)
    return framed


@kernel
def add_lanes(sums, size, tile_taps, grad_weight):
    """The gradient (C', taps) from the sums of the tiles, which are by lane."""
    for o in range(grad_weight.shape[0]):
        for t in range(grad_weight.shape[1]):
            total, start = 0.0, (o % size * tile_taps + t % tile_taps) * LANES
            for lane in range(LANES):
                total += sums[o // size, t // tile_taps, start + lane]
            grad_weight[o, t] = total


@kernel
def add_bias(out, bias):
    """Add a number to each plane (C, H, W, N)."""
    for c in range(len(out)):
        for r in range(out.shape[1]):
            for s in range(out.shape[2]):
                for i in range(out.shape[3]):
                    out[c, r, s, i] += bias[c]


@kernel
def bias_gradient(grad, grad_bias):
    """The sums of planes (C, H, W, N)."""
    for c in range(len(grad)):
        plane, total = grad[c], 0.0
        for r in range(plane.shape[0]):
            for s in range(plane.shape[1]):
                part = np.float32(0)
                for i in range(plane.shape[2]):
                    part += plane[r, s, i]
                total += part
        grad_bias[c] = total
