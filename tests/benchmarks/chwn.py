"""PyTorch operations on maps (C, H, W, N) over the package's kernels, for networks that its notation cannot say."""

import numpy as np
import torch
from torch import Tensor, nn

from nas_mnist.kernels import affine as affine_kernel
from nas_mnist.kernels import convolution, optimizers
from nas_mnist.kernels.compilation import kernel
from nas_mnist.kernels.maps import plane_size

NORM_EPS, NORM_MOMENTUM = 1e-5, 0.1


@kernel(cache=True)
def _convolve(x, weights, out, stride, padding, depthwise, transposed):
    """`frame` has room for a plane with a border of a kernel's size less one."""
    border = 2 * weights.shape[2] - 2
    frame = np.empty(plane_size(x.shape[1] + border, x.shape[2] + border, x.shape[3]) if depthwise else 0, np.float32)
    convolution.convolve(x, weights, out, stride, padding, depthwise, transposed, frame)


@kernel(cache=True)
def _weight_gradient(x, grad, grad_weight, stride, padding, depthwise, frame):
    """`convolution.weight_gradient`; of depthwise ones a plane at a time, as the interpreter does."""
    if depthwise:
        for c in range(len(x)):
            convolution.weight_gradient(
                x[c : c + 1], grad[c : c + 1], grad_weight[c : c + 1], stride, padding, depthwise, frame
            )
    else:
        convolution.weight_gradient(x, grad, grad_weight, stride, padding, depthwise, frame)


class Convolution(torch.autograd.Function):
    """(C, H, W, N), weights (C', C, K, K) or depthwise (C, 1, K, K) → (C', H', W', N)."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding, depthwise):
        ctx.save_for_backward(x, weight)
        ctx.of = stride, padding, depthwise
        _, h, w, n = x.shape
        k = weight.shape[2]
        side = (h + 2 * padding - k) // stride + 1
        out = torch.empty(len(weight), side, (w + 2 * padding - k) // stride + 1, n)
        _convolve(x.numpy(), weight.detach().numpy(), out.numpy(), stride, padding, depthwise, False)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, depthwise = ctx.of
        grad = grad.contiguous()
        grad_weight = torch.empty_like(weight)
        c, h, w, n = x.shape
        size = c * plane_size.py_func(h + 2 * padding, w + 2 * padding, n)
        frame = np.empty(size if padding else 0, np.float32)
        _weight_gradient(x.numpy(), grad.numpy(), grad_weight.numpy(), stride, padding, depthwise, frame)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None, None
        grad_x = torch.empty_like(x)
        _convolve(grad.numpy(), weight.detach().numpy(), grad_x.numpy(), stride, padding, depthwise, True)
        return grad_x, grad_weight, None, None, None


class Conv(nn.Module):
    """A convolution without bias, initialised as PyTorch does."""

    def __init__(self, n_in: int, n_out: int, kernel: int = 3, stride: int = 1, padding: int = 0, depthwise=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, 1 if depthwise else n_in, kernel, kernel))
        self.stride, self.padding, self.depthwise = stride, padding, depthwise

    def forward(self, x: Tensor) -> Tensor:
        return Convolution.apply(x.contiguous(), self.weight, self.stride, self.padding, self.depthwise)


@kernel(reassociate=True, cache=True)
def _moments(x, out):
    """Mean and variance of each row."""
    for c in range(x.shape[0]):
        row, pivot = x[c], x[c, 0]
        all_total, all_squares = 0.0, 0.0
        for start in range(0, row.size, 4096):
            part = row[start : start + 4096]
            total, squares = np.float32(0), np.float32(0)
            for i in range(part.size):
                v = part[i] - pivot
                total += v
                squares += v * v
            all_total += total
            all_squares += squares
        mean = all_total / row.size
        out[0, c], out[1, c] = pivot + mean, max(all_squares / row.size - mean * mean, 0.0)


@kernel(cache=True)
def _scale(x, scale, shift, y):
    for c in range(x.shape[0]):
        a, b, row, out = scale[c], shift[c], x[c], y[c]
        for i in range(row.size):
            out[i] = row[i] * a + b


@kernel(reassociate=True, cache=True)
def _norm_sums(x, grad, mean, sums):
    for c in range(x.shape[0]):
        row, g, m = x[c], grad[c], mean[c]
        all_total, all_moment = 0.0, 0.0
        for start in range(0, row.size, 4096):
            part, grads = row[start : start + 4096], g[start : start + 4096]
            total, moment = np.float32(0), np.float32(0)
            for i in range(part.size):
                total += grads[i]
                moment += grads[i] * (part[i] - m)
            all_total += total
            all_moment += moment
        sums[0, c], sums[1, c] = all_total, all_moment


@kernel(cache=True)
def _norm_input(x, grad, scale, slope, offset, out):
    for c in range(x.shape[0]):
        row, g, o, a, b, d = x[c], grad[c], out[c], scale[c], slope[c], offset[c]
        for i in range(row.size):
            o[i] = g[i] * a + row[i] * b + d


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, statistics):
        rows = x.view(len(x), -1).numpy()
        _moments(rows, statistics)
        inverse = 1 / np.sqrt(statistics[1] + NORM_EPS)
        scale = weight.detach().numpy() * inverse
        y = torch.empty_like(x)
        shift = (bias.detach().numpy() - statistics[0] * scale).astype(np.float32)
        _scale(rows, scale.astype(np.float32), shift, y.view(len(x), -1).numpy())
        ctx.save_for_backward(x)
        ctx.of = statistics[0].astype(np.float32), inverse, scale
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        mean, inverse, scale = ctx.of
        grad = grad.contiguous()
        rows, grads = x.view(len(x), -1).numpy(), grad.view(len(x), -1).numpy()
        sums = np.empty((2, len(x)))
        _norm_sums(rows, grads, mean, sums)
        n = rows.shape[1]
        slope = -scale * inverse * sums[1] * inverse / n
        offset = -scale * sums[0] / n - mean * slope
        out = torch.empty_like(x)
        f = np.float32
        _norm_input(rows, grads, scale.astype(f), slope.astype(f), offset.astype(f), out.view(len(x), -1).numpy())
        return out, torch.from_numpy((sums[1] * inverse).astype(f)), torch.from_numpy(sums[0].astype(f)), None


class Norm(nn.Module):
    """Batch norm over all but the first dimension; `recalibrating` counts the batches that its statistics are of."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("statistics", torch.stack((torch.zeros(channels), torch.ones(channels))))
        self.recalibrating = 0

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        c = len(x)
        if not self.training:
            scale = self.weight * (self.statistics[1] + NORM_EPS).rsqrt()
            return x * scale.view(c, 1, 1, 1) + (self.bias - self.statistics[0] * scale).view(c, 1, 1, 1)
        statistics = np.empty((2, c))
        y = _Norm.apply(x, self.weight, self.bias, statistics)
        if self.recalibrating:
            self.statistics.lerp_(torch.from_numpy(statistics).float(), 1 / self.recalibrating)
            self.recalibrating += 1
        return y


@kernel(cache=True)
def _largest(x, y, places):
    for c in range(y.shape[0]):
        for r in range(y.shape[1]):
            for s in range(y.shape[2]):
                row, a, b = y[c, r, s], x[c, 2 * r, 2 * s], x[c, 2 * r, 2 * s + 1]
                d, e, place = x[c, 2 * r + 1, 2 * s], x[c, 2 * r + 1, 2 * s + 1], places[c, r, s]
                for i in range(row.size):
                    upper, lower = max(a[i], b[i]), max(d[i], e[i])
                    row[i] = max(upper, lower)
                    first = 0 if a[i] >= b[i] else 1
                    second = 2 if d[i] >= e[i] else 3
                    place[i] = first if upper >= lower else second


@kernel(cache=True)
def _largest_backward(grad, places, out):
    for c in range(grad.shape[0]):
        for r in range(grad.shape[1]):
            for s in range(grad.shape[2]):
                row, place = grad[c, r, s], places[c, r, s]
                for k in range(4):
                    target = out[c, 2 * r + k // 2, 2 * s + k % 2]
                    for i in range(row.size):
                        target[i] = row[i] if place[i] == k else np.float32(0)


class MaxPool(torch.autograd.Function):
    """2×2, an odd last row or column dropped."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        c, h, w, n = x.shape
        y = torch.empty(c, h // 2, w // 2, n)
        places = np.empty(y.shape, np.int8)
        _largest(x.numpy(), y.numpy(), places)
        ctx.of = places, x.shape
        return y

    @staticmethod
    def backward(ctx, grad):
        places, shape = ctx.of
        out = torch.empty(shape) if shape[1] % 2 == shape[2] % 2 == 0 else torch.zeros(shape)
        _largest_backward(grad.contiguous().numpy(), places, out.numpy())
        return out


@kernel(cache=True)
def _affine(pixels, chosen, matrices, gain, offset, out):
    affine_kernel.affine(pixels, chosen, matrices, gain, offset, out)


def select(images, positions: Tensor, matrices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Images (1, 28, 28, N) at these positions, transformed by matrices (N, 2, 3) if there are any; and labels (N,)."""
    chosen = images.indices[positions]
    out = torch.empty(1, 28, 28, len(chosen))
    given = np.zeros((0, 2, 3), np.float32) if matrices is None else matrices.numpy()
    mean, std = images.normalisation.mean, images.normalisation.std
    _affine(
        images.pixels.numpy(),
        chosen.numpy(),
        given,
        np.float32(1 / (255 * std)),
        np.float32(mean / std),
        out[0].numpy(),
    )
    return out, images.labels[chosen]


@kernel(cache=True)
def _soap(weights, grad, mean, square, rows, columns, left, right, scratch, rate, weight_decay, step):
    optimizers.soap(weights, grad, mean, square, rows, columns, left, right, scratch, rate, weight_decay, step)


@kernel(cache=True)
def _adamw(weights, grad, means, squares, rate, weight_decay, step):
    optimizers.adamw(weights, grad, means, squares, rate, weight_decay, step)


class Soap:
    """SOAP of matrices, AdamW of vectors; `rates` and `decays` are factors (default 1) by a parameter's identity."""

    def __init__(self, parameters, weight_decay: float, rates: dict[int, float], decays: dict[int, float]):
        self.parameters, self.decay, self.rates, self.decays = list(parameters), weight_decay, rates, decays
        self.n_steps, self.state = 0, []
        for p in self.parameters:
            if p.ndim > 1:
                r, s = p.flatten(1).shape
                kept = [np.zeros(shape, np.float32) for shape in ((r, s), (r, s), (r, r), (s, s))]
                self.state.append(
                    [*kept, np.eye(r, dtype=np.float32), np.eye(s, dtype=np.float32), np.empty((2, r, s), np.float32)]
                )
            else:
                self.state.append([np.zeros(p.numel(), np.float32), np.zeros(p.numel(), np.float32)])

    def step(self, rate: float) -> None:
        self.n_steps += 1
        for p, state in zip(self.parameters, self.state, strict=True):
            own, decay = rate * self.rates.get(id(p), 1.0), self.decay * self.decays.get(id(p), 1.0)
            if p.ndim > 1:
                shape = p.flatten(1).shape
                weights, grad = p.detach().numpy().reshape(shape), p.grad.numpy().reshape(shape)
                _soap(weights, grad, *state, own, decay, self.n_steps)
            else:
                _adamw(p.detach().numpy(), p.grad.numpy(), *state, own, decay, self.n_steps)
            p.grad = None
