"""optuna-dashboard on the studies of a storage."""

import socket

from nas_mnist.errors import StudyError
from nas_mnist.study import Storage


def serve(storage: Storage, host: str, port: int) -> None:
    """Serve until interrupted. Raises `StudyError` if there is no database or the port is taken."""
    from optuna_dashboard import run_server

    opened = storage.open()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StudyError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another with --port"
            ) from error
    print(f"optuna-dashboard for {storage}: http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    run_server(opened, host=host, port=port)
