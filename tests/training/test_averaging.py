import torch

from nas_mnist.data.folds import search_split
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.training.averaging import N_UPDATES, AveragedWeights
from nas_mnist.training.loop import train
from nas_mnist.training.recipe import Recipe

ARCHITECTURE = parse("c4 M c6 G c10k1-")
RECIPE = Recipe(epochs=3, batch_size=64, optimizer="soap", learning_rate=0.01, weight_decay=0.01, recalibrated=True)


def test_averaging_leaves_the_training_as_it_is(images):
    split = search_split(images, 2000)
    val = split.val.part(split.val.indices[::20])
    runs = []
    for averaged_epochs in ((), (1, 3)):
        network = build(ARCHITECTURE, seed=0)
        runs.append(list(train(network, RECIPE, split.train, val, seed=0, averaged_epochs=averaged_epochs)))
    plain, averaged = runs
    assert [e.eval_loss for e in plain] == [e.eval_loss for e in averaged]
    assert [e.train_loss for e in plain] == [e.train_loss for e in averaged]
    assert [e.averaged_loss is None for e in averaged] == [False, True, False]
    assert all(e.averaged_accuracy is None for e in plain)


def test_mean_is_that_of_the_last_part_of_the_training():
    network = build(ARCHITECTURE, seed=0)
    weight = next(network.parameters())
    averaged = AveragedWeights(network, window=1 / 5)
    means = []
    for number in range(1, 10 * N_UPDATES + 1):
        weight.data.fill_(float(number))
        averaged.update()
        means.append(next(averaged._averaged.parameters()).mean().item())
    assert means[0] == 1.0
    for number in (2 * N_UPDATES, 10 * N_UPDATES):
        assert 0.1 * number < number - means[number - 1] < 0.25 * number


def test_evaluation_of_the_mean_touches_neither_network_nor_generator(images):
    split = search_split(images, 300)
    network = build(ARCHITECTURE, seed=0)
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.random.get_rng_state()
    averaged = AveragedWeights(network)
    averaged.update()
    averaged.evaluate(split.train, split.val.part(split.val.indices[::20]))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
