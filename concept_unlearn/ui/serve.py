"""Serving the page from this machine: a port of its own, and an end that leaves the model as it was."""

from __future__ import annotations

import errno
import importlib.util
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidConfig, MissingExtra
from .shelf import Shelf

if TYPE_CHECKING:
    import uvicorn

    from .stage import Stage

_ICON = "✂️"


def check_installed() -> None:
    """Raises MissingExtra, which names the pip line."""
    for package in ("nicegui", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("'concept-unlearn[ui]'", "for the live page")


def listen(host: str, port: int) -> socket.socket:
    """The page's address, taken. ``port`` 0 takes any that is free. Raises InvalidConfig where it cannot be had."""
    if not 0 <= port < 2**16:
        raise InvalidConfig(f"--host {host} --port {port}: ports are 0 to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InvalidConfig(f"--host {host} --port {port} is no address of this machine: {error}") from None
    taken = socket.socket(family, kind, protocol)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
        taken.listen()
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            free = _free(host)
            raise InvalidConfig(f"port {port} of {host} is in use; {free} is free: --port {free}") from None
        raise InvalidConfig(f"--host {host} --port {port} cannot be listened at: {error.strerror}") from None
    return taken


def _free(host: str) -> int:
    with listen(host, 0) as taken:
        return int(taken.getsockname()[1])


def address_of(taken: socket.socket) -> str:
    host, port = taken.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/"


def make_server(stage: Stage, runs: Path) -> uvicorn.Server:
    """Raises MissingExtra. Of a process there may be one."""
    check_installed()
    import uvicorn
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import FileResponse
    from nicegui import ui

    from .page import chat_page, reports_page

    shelf, app = Shelf(runs), FastAPI(openapi_url=None)

    @app.get("/runs/{address:path}")
    def report(address: str) -> FileResponse:
        found = shelf.path(address)
        if found is None:
            raise HTTPException(404, f"no report at {address}")
        return FileResponse(found)

    ui.page("/")(lambda: chat_page(stage))
    ui.page("/reports")(lambda: reports_page(shelf))
    ui.run_with(
        app,
        title="concept_unlearn",
        favicon=_ICON,
        dark=None,
        tailwind=False,
        language="en-US",
        show_welcome_message=False,
    )
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))


def serve(stage: Stage, *, runs: Path, taken: socket.socket, browser: bool, say: Callable[[str], None]) -> None:
    """Until it is interrupted. ``taken`` is of ``listen``; ``say`` is told the address."""
    server = make_server(stage, runs)
    say(address_of(taken))
    if browser:
        webbrowser.open(address_of(taken))
    try:
        server.run(sockets=[taken])
    finally:
        stage.close()
