"""The steps of SGD, AdamW and SOAP; `training/optimizers.py` has the same in PyTorch, and says where they are from."""

import numpy as np

from nas_mnist.kernels.compilation import kernel

BETA1, BETA2 = 0.9, 0.999  # of AdamW
SOAP_BETA = 0.95  # of every running mean, a step
EPSILON = 1e-8
PRECONDITION_FREQUENCY = 20  # steps that a basis of SOAP serves


@kernel
def sgd(weights, grad, momenta, rate, weight_decay, momentum, step):
    """Nesterov momentum; all (P,). Steps count from 1: the first takes the gradient for the momentum."""
    keep = np.float32(momentum if step > 1 else 0.0)
    look, rate, decay = np.float32(momentum), np.float32(rate), np.float32(weight_decay)
    for i in range(weights.size):
        d = grad[i] + decay * weights[i]
        momenta[i] = keep * momenta[i] + d
        weights[i] -= rate * (d + look * momenta[i])


@kernel
def adamw(weights, grad, means, squares, rate, weight_decay, step):
    """AdamW; all (P,)."""
    size = np.float32(rate / (1 - BETA1**step))
    root = np.float32(1 / np.sqrt(1 - BETA2**step))
    shrink, epsilon = np.float32(1 - rate * weight_decay), np.float32(EPSILON)
    first, second = np.float32(1 - BETA1), np.float32(1 - BETA2)
    for i in range(weights.size):
        g = grad[i]
        means[i] += first * (g - means[i])
        squares[i] += second * (g * g - squares[i])
        weights[i] = weights[i] * shrink - size * means[i] / (np.sqrt(squares[i]) * root + epsilon)


@kernel
def soap(weights, grad, mean, square, rows, columns, left, right, scratch, rate, weight_decay, step):
    """SOAP for a matrix (R, S): `rows` (R, R) and `columns` (S, S) are its factors, `left`, `right` their eigenvectors.

    `mean` and `square` are along these. `scratch` (2, R, S).
    """
    if step % PRECONDITION_FREQUENCY == 2:  # first after one step: before it is nothing to go by
        renew_bases(mean, square, rows, columns, left, right, scratch[0])
    renew = np.float32(1 - SOAP_BETA)
    _fold_products(rows, grad, renew)
    _fold_squares(columns, grad, renew)
    n_rows, n_columns = mean.shape
    turned, half = scratch[0], scratch[1]
    _turn(grad, left, right, half, turned)
    epsilon = np.float32(EPSILON)
    for r in range(n_rows):
        for s in range(n_columns):
            mean[r, s] += renew * (turned[r, s] - mean[r, s])
            square[r, s] += renew * (turned[r, s] * turned[r, s] - square[r, s])
            turned[r, s] = mean[r, s] / (np.sqrt(square[r, s]) + epsilon)
    _turn_back(turned, left, right, half)
    size, shrink = np.float32(rate / np.sqrt(1 - SOAP_BETA**step)), np.float32(1 - rate * weight_decay)
    for r in range(n_rows):
        for s in range(n_columns):
            weights[r, s] = weights[r, s] * shrink - size * turned[r, s]


@kernel
def renew_bases(mean, square, rows, columns, left, right, scratch):
    """Find both factors' eigenvectors anew, and what the moments are along them; all in place. `scratch` (R, S)."""
    turn, other = _renew(rows, left), _renew(columns, right)
    _turn_back(mean, turn, other, scratch)
    _square(turn)
    _square(other)
    _turn_back(square, turn, other, scratch)  # of a sum of directions that vary each on its own


@kernel
def _renew(factor, basis):
    """The turn from the old basis to the new one, which takes its place. In loops: as arrays they compile for seconds.

    In float64, and without NaN: `training/optimizers.py` says why.
    """
    n = len(factor)
    given, turn = np.empty((n, n), np.float64), np.zeros((n, n), np.float32)
    for i in range(n):
        for j in range(n):
            given[i, j] = factor[i, j] if np.isfinite(factor[i, j]) else 0.0
    _, found = np.linalg.eigh(given)
    for i in range(n):
        for k in range(n):
            renewed = np.float32(found[i, k])
            for j in range(n):
                turn[k, j] += renewed * basis[i, j]
    for i in range(n):
        for k in range(n):
            basis[i, k] = found[i, k]
    return turn


@kernel
def _square(x):
    for i in range(len(x)):
        for j in range(len(x)):
            x[i, j] *= x[i, j]


@kernel
def _fold_products(factor, grad, renew):
    """factor ← factor + renew·(grad·gradᵀ − factor)."""
    n = len(factor)
    for r in range(n):
        for q in range(r + 1):
            total = _dot(grad[r], grad[q])
            factor[r, q] += renew * (total - factor[r, q])
            factor[q, r] = factor[r, q]


@kernel(reassociate=True)
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@kernel
def _fold_squares(factor, grad, renew):
    """factor ← factor + renew·(gradᵀ·grad − factor)."""
    n = len(factor)
    keep = np.float32(1) - renew
    for s in range(n):
        for t in range(n):
            factor[s, t] *= keep
        for r in range(len(grad)):
            share = renew * grad[r, s]
            for t in range(n):
                factor[s, t] += share * grad[r, t]


@kernel
def _turn(x, left, right, half, out):
    """out = leftᵀ·x·right."""
    n_rows, n_columns = x.shape
    half[:], out[:] = 0, 0
    for r in range(n_rows):
        for q in range(n_rows):
            for s in range(n_columns):
                half[q, s] += left[r, q] * x[r, s]
    for q in range(n_rows):
        for s in range(n_columns):
            for t in range(n_columns):
                out[q, t] += half[q, s] * right[s, t]


@kernel
def _turn_back(x, left, right, half):
    """x ← left·x·rightᵀ."""
    n_rows, n_columns = x.shape
    half[:] = 0
    for r in range(n_rows):
        for q in range(n_rows):
            for s in range(n_columns):
                half[r, s] += left[r, q] * x[q, s]
    for r in range(n_rows):
        for s in range(n_columns):
            x[r, s] = _dot(half[r], right[s])
