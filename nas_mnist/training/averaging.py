"""The mean of a network's recent weights: what it would be if the learning rate fell now."""

import copy

import torch

from nas_mnist.data.images import Images
from nas_mnist.model.network import Network
from nas_mnist.training.evaluation import evaluate, recalibrate

N_UPDATES = 20  # an epoch
# Of the steps so far. A fifth is as good at a rate of 0.01; at twice that, in batches of 32, the weights move too far,
# and the loss of some means over it is several times that of others: `studies/ranking/README.md` has the figures.
WINDOW = 1 / 20


class AveragedWeights:
    """A mean over the last part of the training so far, beside it and without any effect on it.

    While the learning rate is high a network's own accuracy is mostly noise; that of the mean ranks candidates. After
    P. Izmailov et al., Averaging Weights Leads to Wider Optima, 2018, arXiv 1803.05407; the growing window is that of
    polynomial-decay averaging (O. Shamir and T. Zhang, 2013, arXiv 1212.1824).
    """

    def __init__(self, network: Network, window: float = WINDOW):
        self._averaged = copy.deepcopy(network)
        self._pairs = list(zip(self._averaged.parameters(), network.parameters(), strict=True))
        self._n_updates, self._window = 0, window

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights into the mean; to be called `N_UPDATES` times an epoch."""
        self._n_updates += 1
        share = min(1.0, 1 / (self._window * self._n_updates))
        for mean, present in self._pairs:
            mean.lerp_(present, share)

    def evaluate(self, train_images: Images, val_images: Images) -> tuple[float, float]:
        """Mean cross-entropy in nats and accuracy of the mean, its norms recalibrated on training images."""
        recalibrate(self._averaged, train_images)
        return evaluate(self._averaged, val_images)
