"""The application: routes, and the gates before them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from qwen_vram.serving.engine.interface import Engine
from qwen_vram.serving.web.access_log import AccessLog
from qwen_vram.serving.web.answering import Checks, Endpoint, unknown_model
from qwen_vram.serving.web.asgi import App
from qwen_vram.serving.web.gates import LOCAL_NAMES, BodyGate, HostGate, KeyGate, is_loopback
from qwen_vram.serving.web.metrics import CONTENT_TYPE, Metrics
from qwen_vram.serving.web.settings import Settings
from qwen_vram.serving.wire.problem import ApiError
from qwen_vram.serving.wire.requests import chat_request, completion_request

_CHAT, _COMPLETIONS, _MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
PATHS = (_CHAT, _COMPLETIONS, _MODELS, "/health", "/metrics")


def make_app(
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    write: Callable[[str], None],
    started: Callable[[], None] = lambda: None,
) -> App:
    """Return the ASGI application of a server.

    Args:
        write: Takes a line for the access log.
        started: Called in the event loop before the first request.
    """
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        started()
        yield

    # FastAPI's pages of documentation load scripts from another server, so they are off.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    created = int(time.time())
    entry = {"id": settings.name, "object": "model", "created": created, "owned_by": "qwen_vram"}

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: f"there is no such path here; paths are {', '.join(PATHS)}", 405: "this path has other methods"}
        problem = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), code="not_found")
        return JSONResponse(problem.body(), error.status_code, headers=dict(error.headers or {}))

    @app.get("/health")
    async def health() -> Response:
        state, reason = engine.state()
        content = {"status": state, "reason": reason, "running": engine.running(), "waiting": len(engine.queue)}
        return JSONResponse(content, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def measured() -> Response:
        return PlainTextResponse(metrics.text(engine), media_type=CONTENT_TYPE)

    @app.get(_MODELS)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get(_MODELS + "/{name:path}")
    async def model(name: str) -> Response:
        if name != settings.name:
            problem = unknown_model(name, settings.name)
            return JSONResponse(problem.body(), problem.status)
        return JSONResponse(entry)

    checks = Checks(lambda: settings.max_waiting + engine.queue.places, engine.queue.full)
    for path, read in ((_CHAT, chat_request), (_COMPLETIONS, completion_request)):
        endpoint = Endpoint(
            engine,
            read,
            model=settings.name,
            heartbeat=settings.heartbeat,
            max_wait=settings.max_wait,
            checks=checks,
        )
        app.router.routes.append(Route(path, endpoint, methods=["POST"]))

    return behind_gates(app, settings, PATHS, metrics, write)


def behind_gates(
    app: App, settings: Settings, paths: Collection[str], metrics: Metrics, write: Callable[[str], None]
) -> App:
    """Return an application behind the gates of `settings`, with a log of its requests.

    Args:
        paths: Paths that the log names.
    """
    from fastapi.middleware.cors import CORSMiddleware

    outer: Any = BodyGate(app, most=settings.max_body, seconds=settings.body_seconds)
    outer = KeyGate(outer, settings.api_key)
    if settings.origins:
        headers = ["Authorization", "Content-Type"]
        outer = CORSMiddleware(
            outer, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=headers
        )
    names = settings.allowed_hosts
    if not names and is_loopback(settings.host):
        names = (*LOCAL_NAMES, settings.host)
    outer = HostGate(outer, names)
    return AccessLog(outer, paths, write, metrics.request)
