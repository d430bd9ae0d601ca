"""Which of several candidates is likely to be good: a ridge regression on what was tried, seen by its shapes.

A draw costs nothing, a training costs minutes, so it pays to draw several and to train the one of the best prospects.
After W. Wen et al., Neural Predictor for Neural Architecture Search, 2019, arXiv 1912.00848; here a line through a few
numbers of each network, because there are but some dozens to learn from. How well it ranks what it has not seen is
measured in `studies/ranking/README.md`.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import log

import numpy as np
from scipy.stats import norm

from nas_mnist.model.architecture import Conv, GlobalPool, LayerShape, MaxPool
from nas_mnist.study.space import Candidate

SHRINKAGE = 30.0  # as many observations that say that nothing matters
LEAST_SPREAD = 0.3  # of a feature: where all that was tried had the same, another is new, and not endlessly so
HOPE = 1.0  # without any, it would have the smallest changes of the best


class Predictor:
    """Fitted to candidates, the best of which comes first: only their order counts, so that one bad one is just bad."""

    def __init__(self, best_first: Sequence[Candidate]):
        n = len(best_first)
        x = np.array([features(candidate) for candidate in best_first])
        y = norm.isf((np.arange(n) + 0.5) / n)
        self._mean, self._scale = x.mean(0), np.maximum(x.std(0), LEAST_SPREAD)
        x = (x - self._mean) / self._scale
        self._covariance = np.linalg.inv(x.T @ x + SHRINKAGE * np.eye(x.shape[1]))
        self._weights = self._covariance @ x.T @ y
        self._residual = float((y - x @ self._weights).std())

    def __call__(self, candidate: Candidate) -> float:
        """What may be hoped for, the larger the better: expected, and `HOPE` times the standard deviation of that."""
        x = self._normalised(candidate)
        return self.expected(candidate) + HOPE * self._residual * float(np.sqrt(x @ self._covariance @ x))

    def expected(self, candidate: Candidate) -> float:
        """Where it would stand among those learned from, in standard deviations above the middle."""
        return float(self._normalised(candidate) @ self._weights)

    def _normalised(self, candidate: Candidate) -> np.ndarray:
        return (features(candidate) - self._mean) / self._scale


def features(candidate: Candidate) -> np.ndarray:
    """What a network is like, and its recipe, in numbers of about the same size."""
    architecture, recipe = candidate.architecture, candidate.recipe
    convs = [shape for shape in architecture.shapes if isinstance(shape.layer, Conv)]
    spatial = [shape for shape in convs if shape.kernel > 1] or convs
    widths = [shape.channels for shape in convs[:-1]] or [convs[0].in_channels]
    pools = sum(isinstance(layer, MaxPool) for layer in architecture.layers)
    half = len(spatial) // 2
    return np.array(
        [
            len(spatial),
            len(convs) - len(spatial),
            pools,
            _depth_before_pool(architecture.shapes) / len(spatial),
            sum(_is_separable(shape) for shape in spatial[:half]),
            sum(_is_separable(shape) for shape in spatial[half:]),
            any(shape.padding for shape in spatial),
            isinstance(architecture.layers[-1], GlobalPool),
            log(architecture.n_macs),
            log(architecture.n_activations),
            architecture.receptive_field / 28,
            spatial[-1].side / 5,
            log(widths[0]),
            log(widths[-1]),
            log(max(widths)),
            log(min(widths)),
            min((log(b / a) for a, b in pairwise(widths)), default=0.0),  # the narrowest bottleneck
            *_late_shares(convs),
            architecture.activation == "relu",
            architecture.deskewed,
            architecture.dropout * 50,
            log(recipe.learning_rate),
            log(max(recipe.weight_decay, 1e-6)),
        ],
        dtype=float,
    )


def _is_separable(shape: LayerShape) -> bool:
    return isinstance(shape.layer, Conv) and shape.layer.separable


def _depth_before_pool(shapes: Sequence[LayerShape]) -> int:
    """The convolutions over pixels before the first pool; all of them if there is none."""
    depth = 0
    for shape in shapes:
        if isinstance(shape.layer, MaxPool):
            break
        depth += isinstance(shape.layer, Conv) and shape.kernel > 1
    return depth


def _late_shares(convs: Sequence[LayerShape]) -> tuple[float, float]:
    """The share of parameters on maps of half the image's side and less, and the logarithm of that of multiply-adds."""
    late = [shape for shape in convs if shape.side <= 14]
    parameters = sum(shape.n_parameters for shape in late) / sum(shape.n_parameters for shape in convs)
    macs = sum(shape.n_macs for shape in late) / sum(shape.n_macs for shape in convs)
    return parameters, log(macs + 1e-3)
