"""The processes of a search."""

import psutil


def workers_of(search) -> list[psutil.Process]:
    """Those that train: children of the one process that a search forks them from. `search` has a `pid`."""
    children = psutil.Process(search.pid).children()
    servers = [child for child in children if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    return [worker for server in servers for worker in server.children()]
