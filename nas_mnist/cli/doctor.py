"""`doctor`: what this machine is to us, and whether it computes right."""

import json

from nas_mnist.cli.options import add_command, add_data_dir, add_json, data_dir_of


def add_doctor(commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        "tell what this machine is to us, and run the fast training steps against plain PyTorch on each device",
        example="nas-mnist doctor",
    )
    add_json(parser)
    add_data_dir(parser)


def _doctor(arguments) -> int:
    from rich.console import Console

    from nas_mnist.views import doctor as views
    from nas_mnist.workers import doctor

    console = Console(highlight=False)
    machine = doctor.look(data_dir_of(arguments))
    if not arguments.json:
        console.print(views.machine_table(machine), "")
    with Console(stderr=True).status("comparing the fast steps with plain PyTorch …"):
        checks = list(doctor.check())
    if arguments.json:
        print(json.dumps(views.values(machine, checks), indent=2))
    else:
        console.print(views.check_table(checks), "", views.verdict_line(checks), sep="\n")
    return 0 if all(checked.agrees for checked in checks) else 1
