"""Server that starts vLLM, passes requests through to it, and ends it."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from qwen_vram.planning.vllm.arguments import VllmArguments
from qwen_vram.serving.vllm.child import Child
from qwen_vram.serving.vllm.metrics import metrics_text
from qwen_vram.serving.vllm.passing import Upstream, health
from qwen_vram.serving.vllm.startup_log import compared
from qwen_vram.serving.vllm.state import Progress, State
from qwen_vram.serving.web.access_log import write_line
from qwen_vram.serving.web.app import behind_gates
from qwen_vram.serving.web.asgi import App, Receive, Scope, Send, answer, refuse
from qwen_vram.serving.web.metrics import CONTENT_TYPE, Metrics
from qwen_vram.serving.web.server import address_of, check_installed, listening_socket, on_signals, uvicorn_server
from qwen_vram.serving.web.settings import Settings
from qwen_vram.serving.wire.problem import ApiError

if TYPE_CHECKING:
    import uvicorn

# Options that vLLM gets beside the plan's: its lines for each request would repeat this server's.
_OPTIONS = ("--disable-uvicorn-access-log",)
# No figures about the machine are sent to vLLM's authors. Source: vLLM 0.33.0, vllm/envs.py, VLLM_NO_USAGE_STATS.
_VARIABLES = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
# Paths that the log of requests names.
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/embeddings", "/v1/responses")
PATHS = (*_PATHS, "/health", "/metrics")
# Seconds between questions to a vLLM that starts, and between looks at one that runs.
_PAUSE = 0.5
# Seconds that vLLM has for its end after the running requests.
_END_SECONDS = 20.0


def free_port() -> int:
    """Return a port of this machine that no program uses now."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


class Front:
    """The ASGI application in front of a vLLM process."""

    def __init__(self, arguments: VllmArguments, child: Child, upstream: Upstream, progress: Progress) -> None:
        self._arguments, self._child = arguments, child
        self.upstream, self.progress = upstream, progress
        self.metrics = Metrics()
        self._was_ready = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `/health` and `/metrics`, and pass all other requests through."""
        if scope["path"] == "/health" and scope["method"] == "GET":
            await health(await self._state(), self.upstream.running, send)
        elif scope["path"] == "/metrics" and scope["method"] == "GET":
            own = await self.upstream.metrics() if self.progress.state.name == "ready" else ""
            text = metrics_text(
                self.metrics,
                self.progress.state.name,
                self.upstream.running,
                self._arguments.memory,
                self.progress.reported,
                self._child.pid,
                own,
            )
            await answer(send, 200, text.encode(), CONTENT_TYPE)
        elif scope["path"].startswith("/v1/"):
            await self.upstream(scope, receive, send)
        else:
            paths = "/v1/..., /health, /metrics"
            await refuse(send, ApiError(404, f"there is no such path here; paths are {paths}", code="not_found"))

    async def _state(self) -> State:
        """Return the state, after a look at the process and a question to vLLM."""
        state = self.progress.state
        if state.name in ("loading", "ready") and self._child.returncode() is not None:
            self.progress.change("failed", "vLLM ended")
        elif state.name == "ready" and not await self.upstream.is_healthy():
            return State("failed", "vLLM does not answer that it is healthy")
        return self.progress.state

    async def follow(self, ended: Callable[[], None]) -> None:
        """Wait until vLLM is ready, say what it holds beside the plan, and then wait for its end."""
        memory = self._arguments.memory
        while self._child.returncode() is None:
            if self.progress.state.name == "loading" and await self.upstream.is_healthy():
                self._was_ready = True
                self.progress.change("ready", "")
                write_line(compared(self.progress.reported, memory.tokens, memory.concurrency))
            await asyncio.sleep(_PAUSE)
        if self.progress.state.name == "stopping":
            return
        self.progress.change("failed", "vLLM ended")
        write_line(f"error: {str(self._child.ended()).splitlines()[0]}")
        if not self._was_ready:
            ended()


def serve_vllm(
    arguments: Callable[[int], VllmArguments],
    program: str,
    settings: Settings,
    *,
    listening: Callable[[str], None],
    shown: Callable[[VllmArguments], None],
) -> None:
    """Serve a plan by vLLM until SIGTERM or Ctrl-C.

    Args:
        arguments: Returns the arguments of vLLM for a port.
        program: The executable of vLLM.
        listening: Takes the address of this server.
        shown: Takes the arguments before vLLM starts.

    Raises:
        BackendUnavailableError: a library of the extra `serve` or vLLM is missing.
        WorkloadError: the address cannot be used.
        VllmEndedError: vLLM ended before it was ready.
    """
    check_installed("httpx2")
    bound = listening_socket(settings.host, settings.port)
    port, key = free_port(), secrets.token_urlsafe(32)
    given = arguments(port)
    shown(given)
    progress = Progress()

    def line(text: str) -> None:
        progress.read(text)
        write_line(f"vllm | {text}")

    command = [*given.command(program), *_OPTIONS]
    child = Child(command, {**_VARIABLES, **given.environment, "VLLM_API_KEY": key}, line)
    server: uvicorn.Server | None = None
    seconds, died = _END_SECONDS, False
    try:
        front = Front(given, child, Upstream(f"http://127.0.0.1:{port}", key, lambda: progress.state), progress)

        def stop() -> None:
            nonlocal seconds
            assert server is not None
            if server.should_exit:
                server.force_exit, seconds = True, 0.0  # a second signal ends the grace time
                return
            write_line(f"stopping: running requests have {settings.grace:g} s")
            progress.change("stopping", "the server ends")
            server.should_exit = True
            asyncio.get_running_loop().call_later(settings.grace, setattr, server, "force_exit", True)

        def failed() -> None:
            nonlocal died
            assert server is not None
            died = server.should_exit = True

        app = behind_gates(
            _with_lifespan(front, stop, failed, lambda: listening(address_of(bound, settings))),
            settings,
            PATHS,
            front.metrics,
            write_line,
        )
        server = uvicorn_server(app, settings)
        server.run(sockets=[bound])
        if died:
            raise child.ended()
    finally:
        bound.close()
        child.stop(seconds)


def _with_lifespan(
    front: Front, stop: Callable[[], None], failed: Callable[[], None], started: Callable[[], None]
) -> App:
    """Return an application that follows vLLM while it runs."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        on_signals(stop)
        started()
        following = asyncio.ensure_future(front.follow(failed))
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            await front.upstream.close()

    return Starlette(routes=[Mount("/", app=front)], lifespan=lifespan)
