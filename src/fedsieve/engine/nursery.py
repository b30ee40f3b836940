"""Where worker processes come from.

On Linux they are forked from one process that has loaded what they need, so that a worker starts in a moment and shares the
memory of the libraries with the others. That process starts nothing and computes nothing, for a fork keeps no threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def warm_up() -> None:
    """Start what workers are forked from, without waiting for it. Before torch is imported here, both import it at once.

    To be called at the top of a script that trains with workers; `fedsieve run` does by itself. It does nothing a second time,
    nor in a worker, which reads the script too.
    """
    if multiprocessing.current_process().name == "MainProcess" and isinstance(context(), ForkServerContext):
        with one_thread_each():
            forkserver.ensure_running()


def context() -> ForkServerContext | SpawnContext:
    """Return how workers are started; elsewhere than on Linux each by itself."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(["fedsieve.engine.transports"])
    return multiprocessing.get_context("forkserver")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have processes start with one thread for every numeric library, deaf to Ctrl-C and SIGTERM, which are the server's."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    resource_tracker.ensure_running()  # it would unblock the signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
