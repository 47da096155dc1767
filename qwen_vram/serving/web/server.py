"""Server that listens while the model loads, and lets the running requests end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Timer
from typing import TYPE_CHECKING

import qwen_vram as qv
from qwen_vram.serving.engine.engine import ModelEngine
from qwen_vram.serving.web.access_log import write_line
from qwen_vram.serving.web.app import make_app
from qwen_vram.serving.web.asgi import App
from qwen_vram.serving.web.gates import is_loopback
from qwen_vram.serving.web.metrics import Metrics
from qwen_vram.serving.web.settings import Settings
from qwen_vram.serving.wire.refusals import Refusals

if TYPE_CHECKING:
    import uvicorn

INSTALL = 'pip install "qwen-vram[serve]"'
# Seconds between the end of the grace time and the end of open connections: a step of the model, and its last events.
_LAST_SECONDS = 15.0
# The time that a load may still take after a signal. It cannot be stopped, and nothing is lost with it.
_LOADING_SECONDS = 1.0
# The most connections. Each takes a file descriptor, of which a process usually has 1,024.
_CONNECTIONS = 900


def check_installed(*more: str) -> None:
    """Refuse to go on without the libraries of the extra `serve`.

    Args:
        *more: Names of modules that are needed beside those of every server.

    Raises:
        BackendUnavailableError: fastapi, uvicorn or another module is not installed.
    """
    for name in ("fastapi", "uvicorn", *more):
        try:
            __import__(name)
        except ImportError as error:
            raise qv.BackendUnavailableError(
                f"a server needs {name}, which is not installed; run: {INSTALL}", backend=name, install=INSTALL
            ) from error


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        WorkloadError: the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise qv.WorkloadError(
            f"cannot listen on {host!r}, port {port}: {error}; choose another --port or --host", name="port", got=port
        ) from error


def uvicorn_server(app: App, settings: Settings) -> uvicorn.Server:
    """Return the HTTP server of an application, which writes warnings and errors to the log."""
    import uvicorn

    logging.getLogger("uvicorn").addHandler(_LogLines())
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=max(1, int(settings.grace + _LAST_SECONDS)),
    )
    return uvicorn.Server(config)


def on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on SIGTERM and Ctrl-C, from the running event loop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            loop.add_signal_handler(number, stop)


def address_of(bound: socket.socket, settings: Settings) -> str:
    """Return the address of a socket, and warn of one that other machines can use without a key."""
    host, port = bound.getsockname()[:2]
    if settings.api_key is None and not is_loopback(settings.host):
        write_line("warning: other machines can use this server without a key; set QWEN_VRAM_API_KEY")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    load: Callable[[], qv.LoadedModel],
    settings: Settings,
    *,
    hidden: Iterable[str] = (),
    listening: Callable[[str], None],
) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Args:
        load: Returns the loaded model; called in a thread, while the server listens already.
        hidden: Paths of this machine that no answer may contain.
        listening: Takes the address.

    Raises:
        BackendUnavailableError: as for `check_installed`.
        WorkloadError: as for `listening_socket`.
        QwenVramError: the model cannot be loaded.
    """
    check_installed()
    bound = listening_socket(settings.host, settings.port)
    metrics, refusals = Metrics(), Refusals(hidden, settings.name)
    server: uvicorn.Server | None = None

    def ended() -> None:
        if server is not None and engine.load_error is not None:
            server.should_exit = True

    engine = ModelEngine(
        load,
        most_waiting=settings.max_waiting,
        refusals=refusals,
        log=write_line,
        ended=ended,
        took=metrics.tokens,
    )
    timer = Timer(settings.grace, engine.stop_running)
    timer.daemon = True

    def stop() -> None:
        assert server is not None
        if server.should_exit:
            engine.stop_running()  # a second signal ends the grace time
            return
        write_line(f"stopping: running requests have {settings.grace:g} s")
        engine.drain()
        timer.start()
        server.should_exit = True

    def started() -> None:
        on_signals(stop)
        listening(address_of(bound, settings))
        engine.start()

    server = uvicorn_server(make_app(engine, settings, metrics, write_line, started), settings)
    try:
        server.run(sockets=[bound])
    finally:
        timer.cancel()
        bound.close()
        engine.drain()
        engine.stop_running()
        ended_in_time = engine.join(_LAST_SECONDS if engine.loaded() else _LOADING_SECONDS)
    if engine.load_error is not None:
        raise engine.load_error
    if not ended_in_time:
        # The interpreter would abort when a thread returns from torch after its end.
        write_line("stopped while the model was being loaded")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _LogLines(logging.Handler):
    """Handler of uvicorn's messages, from warnings on, without tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message of a record; a traceback could contain parts of a request."""
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        write_line(f"http {record.levelname.lower()}: {record.msg if error else record.getMessage()} {error}".rstrip())
