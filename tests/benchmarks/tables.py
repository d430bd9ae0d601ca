"""The tables of `make bench`."""

import sys

from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=None if sys.stdout.isatty() else 150)
TARGETS = ("speedup", "speedup_over_plain", "floor_ratio", "trials_an_hour", "evaluation_share")


def show(result: dict) -> None:
    title = (
        f"{result['cpu']}, {result['n_cores']} cores; vectors of {result['kernel_vector_bits']} bits, PyTorch's "
        f"{result['torch_capability']}; {result['matmul_gflops']['median']:.0f} GFLOP/s in a matrix product"
    )
    table = Table("", "way", "images/s", "ms/step", "speed-up", "× floor", "trials/h", "judging", title=title)
    for name, network in result["networks"].items():
        about = f"{name}\n{network['n_parameters']:,} parameters\n{network['optimizer']}, {network['batch_size']}"
        for way, rates in network["images_a_second"].items():
            ours, first = way == "package", way == "reference"
            table.add_row(
                about if first else "",
                way,
                f"{rates['median']:,.0f} ({rates['min']:,.0f} – {rates['max']:,.0f})",
                f"{network['ms_a_step'][way]:.1f}",
                f"{network['speedup']:.1f}\n{network['speedup_over_plain']:.1f} over plain" if ours else "",
                f"{network['floor_ratio']:.1f}" if ours else "",
                f"{network['trials_an_hour']:.0f}" if ours else "",
                f"{network['evaluation_share']:.1%}" if ours else "",
                end_section=ours,
            )
    CONSOLE.print(table)
    for name, network in result["networks"].items():
        shares = sorted(network["shares"].items(), key=lambda item: -item[1])
        CONSOLE.print(f"{name}: {', '.join(f'{kind} {share:.1%}' for kind, share in shares)}", highlight=False)
    CONSOLE.print(
        f"a worker: {result['resident_mb_a_worker']:.0f} MB, {result['own_mb_a_worker']:.0f} MB of them its own",
        highlight=False,
    )


def compare(before: dict, after: dict) -> None:
    """What both have; the ratio is that of after to before."""
    title = f"before: {about(before)}\nafter: {about(after)}"
    table = Table("", "figure", "before", "after", "ratio", title=title)
    for name, network in after["networks"].items():
        old, rows = figures(before["networks"].get(name, {})), figures(network)
        for i, (figure, value) in enumerate(rows.items()):
            known = old.get(figure)
            table.add_row(
                "" if i else name,
                figure,
                "–" if known is None else f"{known:,.2f}",
                f"{value:,.2f}",
                "–" if not known else f"{value / known:.2f}",
                end_section=i == len(rows) - 1,
            )
    CONSOLE.print(table)


def about(result: dict) -> str:
    vectors = f", vectors of {result['kernel_vector_bits']} bits" if "kernel_vector_bits" in result else ""
    return f"{result['cpu']}{vectors}, torch {result['torch']}"


def figures(network: dict) -> dict[str, float]:
    """The recipe is part of a step's name: those of two recipes are not compared."""
    if not network:
        return {}
    recipe = f"{network.get('optimizer', 'sgd')}, {network.get('batch_size', 128)}"
    steps = {f"ms a step, {way} ({recipe})": ms for way, ms in network["ms_a_step"].items()}
    return steps | {f"{target} ({recipe})": network[target] for target in TARGETS if target in network}
