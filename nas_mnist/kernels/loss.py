"""Cross-entropy, and its gradient."""

import numpy as np

from nas_mnist.kernels.compilation import kernel


@kernel
def cross_entropy(logits, labels, smoothing, grad):
    """The sum of the losses in nats, and how many are classified right: logits (K, N), labels (B,), B ≤ N.

    With label smoothing the target is 1 − smoothing for the label and smoothing for all classes alike. `grad` (K, N)
    is filled with the gradient of the mean loss, zero in the padding; it may be the logits' own place.
    """
    n_classes, n_images = len(logits), len(labels)
    loss, n_correct = 0.0, 0
    weights = np.empty(n_classes, np.float64)
    grad[:, n_images:] = 0
    for i in range(n_images):
        best, total, mean = 0, 0.0, 0.0
        for k in range(n_classes):
            if logits[k, i] > logits[best, i] or np.isnan(logits[k, i]):
                best = k
        for k in range(n_classes):
            difference = np.float64(logits[k, i]) - logits[best, i]
            weights[k] = np.exp(difference)
            total += weights[k]
            mean += difference / n_classes
        right = np.float64(logits[labels[i], i]) - logits[best, i]
        loss += np.log(total) - (1 - smoothing) * right - smoothing * mean
        n_correct += best == labels[i]
        for k in range(n_classes):
            target = (1 - smoothing) * (k == labels[i]) + smoothing / n_classes
            grad[k, i] = (weights[k] / total - target) / n_images
    return loss, n_correct
