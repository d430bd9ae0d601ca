"""Networks that differ from one by a single thing of its structure, and have as many parameters."""

from collections.abc import Iterator
from dataclasses import replace

from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import MAX_CHANNELS, Architecture, Conv, Layer, MaxPool

MIN_WIDTH = 2


def variations(architecture: Architecture) -> Iterator[tuple[str, Architecture]]:
    """Each variation and what is different in it, in words. All widths are scaled by one factor to the same size.

    One that is not possible, such as another convolution where the map is too small, is left out.
    """
    limit = architecture.n_parameters
    for name, layers in _structures(architecture):
        try:
            varied = filled(replace(architecture, layers=tuple(layers)), limit)
        except ArchitectureError:
            continue
        if varied.layers != architecture.layers:
            yield name, varied


def without_norms(architecture: Architecture) -> Architecture:
    """The same widths, a bias in the place of each norm."""
    layers = (
        replace(layer, norm=False, bias=True) if isinstance(layer, Conv) and layer.norm else layer
        for layer in architecture.layers
    )
    return replace(architecture, layers=tuple(layers))


def filled(architecture: Architecture, limit: int) -> Architecture:
    """All widths but that of the logits times one factor, the largest with at most `limit` parameters; then what fits.

    Raises `ArchitectureError` if there is none: the narrowest is too large, or its maps too small.
    """
    widths = _widths(architecture)

    def scaled(factor: float) -> Architecture:
        return _with_widths(architecture, [max(MIN_WIDTH, round(width * factor)) for width in widths])

    low, high = 0.0, MAX_CHANNELS / max(widths, default=1)
    if scaled(low).n_parameters > limit:
        raise ArchitectureError(f"`{architecture.line}` has more than {limit:,} parameters at its narrowest")
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle).n_parameters <= limit else (low, middle)
    return _topped_up(scaled(low), [width * low for width in widths], limit)


def _topped_up(architecture: Architecture, wished: list[float], limit: int) -> Architecture:
    """Each layer one channel wider, if that fits; those first that were rounded down most."""
    widths = _widths(architecture)
    for i in sorted(range(len(widths)), key=lambda i: widths[i] - wished[i]):
        wider = [width + (j == i) for j, width in enumerate(widths)]
        if max(wider) <= MAX_CHANNELS and _with_widths(architecture, wider).n_parameters <= limit:
            widths = wider
    return _with_widths(architecture, widths)


def _structures(architecture: Architecture) -> Iterator[tuple[str, list[Layer]]]:
    layers = list(architecture.layers)
    yield from _kinds(layers)
    yield from _transitions(layers)
    yield from _depths(layers)
    widths = _widths(architecture)
    even = round(sum(widths) / max(len(widths), 1))
    yield "all widths the same", list(_with_widths(architecture, [even] * len(widths)).layers)


def _kinds(layers: list[Layer]) -> Iterator[tuple[str, list[Layer]]]:
    """Each block's convolutions separable instead of plain, or the other way round."""
    for number, places in enumerate(_blocks(layers), 1):
        own = [i for i in places if _separates(layers, i)]
        if own:
            separable = not any(layers[i].separable for i in own)
            changed = [replace(layer, separable=separable) if i in own else layer for i, layer in enumerate(layers)]
            yield f"block {number} {'separable' if separable else 'plain'}", changed


def _transitions(layers: list[Layer]) -> Iterator[tuple[str, list[Layer]]]:
    """The 1×1 convolution beside each pool taken away, or one put behind it."""
    for number, pool in enumerate((i for i, layer in enumerate(layers) if isinstance(layer, MaxPool)), 1):
        beside = [i for i in (pool + 1, pool - 1) if 0 <= i < len(layers) - 1 and _is_pointwise(layers[i])]
        if beside:
            yield f"no 1×1 convolution at pool {number}", layers[: beside[0]] + layers[beside[0] + 1 :]
        elif before := [layer.channels for layer in layers[:pool] if isinstance(layer, Conv)]:
            added = Conv(max(MIN_WIDTH, before[-1] // 2), kernel=1)
            yield f"a 1×1 convolution behind pool {number}", [*layers[: pool + 1], added, *layers[pool + 1 :]]


def _depths(layers: list[Layer]) -> Iterator[tuple[str, list[Layer]]]:
    """Each block one convolution deeper, and one shallower."""
    for number, places in enumerate(_blocks(layers), 1):
        own = [i for i in places if _is_spatial(layers[i])]
        if own:
            last = own[-1]
            yield f"block {number} one deeper", [*layers[: last + 1], layers[last], *layers[last + 1 :]]
            if len(own) > 1:
                yield f"block {number} one shallower", layers[:last] + layers[last + 1 :]


def _blocks(layers: list[Layer]) -> list[list[int]]:
    """The places of the layers between the pools."""
    blocks: list[list[int]] = [[]]
    for i, layer in enumerate(layers):
        if isinstance(layer, MaxPool):
            blocks.append([])
        else:
            blocks[-1].append(i)
    return blocks


def _is_spatial(layer: Layer) -> bool:
    return isinstance(layer, Conv) and layer.kernel > 1 and layer.activation


def _separates(layers: list[Layer], i: int) -> bool:
    """Whether it can be separable: an image of one channel has nothing to separate, and the logits stay as they are."""
    before, after = (any(isinstance(layer, Conv) for layer in part) for part in (layers[:i], layers[i + 1 :]))
    return _is_spatial(layers[i]) and before and after


def _is_pointwise(layer: Layer) -> bool:
    return isinstance(layer, Conv) and layer.kernel == 1


def _widths(architecture: Architecture) -> list[int]:
    return [layer.channels for layer in architecture.layers[: architecture.last_conv] if isinstance(layer, Conv)]


def _with_widths(architecture: Architecture, widths: list[int]) -> Architecture:
    """With other widths for all convolutions but the last one, whose channels are the classes."""
    rest = iter(widths)
    last = architecture.last_conv
    layers = (
        replace(layer, channels=next(rest)) if isinstance(layer, Conv) and i < last else layer
        for i, layer in enumerate(architecture.layers)
    )
    return replace(architecture, layers=tuple(layers))
