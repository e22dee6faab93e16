"""`loragen serve`: adapters from prompts over HTTP."""

import os
import signal
import socket
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from loragen.cli import options, render
from loragen.core.errors import UsageError, pip_install

TOKEN = "LORAGEN_SERVE_TOKEN"
VLLM_KEY = "VLLM_API_KEY"
SHORTEST_TOKEN = 16


def run_server(
    model: options.GeneratorPath,
    host: Annotated[
        str,
        typer.Option("--host", help="The address; any but loopback needs a token."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port; 0: one that is free.")
    ] = 8080,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", help=f"A file with the bearer token of clients; or set {TOKEN}."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Keep all adapters here, for clients and vLLM that share the directory. Default: "
            "a temporary directory.",
        ),
    ] = None,
    vllm: Annotated[
        str | None,
        typer.Option(
            "--vllm",
            metavar="URL",
            help=f"A running vLLM to load adapters into; {VLLM_KEY} is its key. Needs --output.",
        ),
    ] = None,
    vllm_directory: Annotated[
        Path | None,
        typer.Option(
            "--vllm-directory", help="The path of --output in vLLM's container, if it is another."
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, max=256, help="Requests in work together.")
    ] = 8,
    max_queue: Annotated[
        int,
        typer.Option("--max-queue", min=1, help="Requests that may wait; others get 429."),
    ] = 64,
    max_bytes: Annotated[
        int, typer.Option("--max-bytes", min=1, help="The largest body of a request, in bytes.")
    ] = 2**20,
    max_prompts: Annotated[
        int, typer.Option("--max-prompts", min=1, help="The most prompts of a request.")
    ] = 1000,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds until a request is answered.")
    ] = 60.0,
    keep: Annotated[
        int,
        typer.Option("--keep", min=1, help="Adapters that are kept without --output, last used."),
    ] = 1000,
) -> None:
    """Serve a generator over HTTP: prompts in, adapters out.

    POST /v1/adapters answers with the adapter that gen infer writes from the same prompts, or loads
    it into vLLM. Ctrl+C or SIGTERM ends the server once it has answered what it has accepted. See
    docs/service.md.
    """
    from loragen.core.run.directory import generator_file

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if not find_spec(name)]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}: {pip_install('serve')}")
    file = generator_file(model)
    token, addresses = _token(token_file), _addresses(host, port)
    if not token and not all(ip_address(one[4][0]).is_loopback for one in addresses):
        raise UsageError(
            f"--host {host}: others reach it, so clients need a token: set {TOKEN} or --token-file"
        )
    if vllm and (not output or urlsplit(vllm).scheme not in ("http", "https")):
        raise UsageError("--vllm: give the URL of a server (http://...), and --output DIR")
    if vllm_directory and not vllm:
        raise UsageError("--vllm-directory: it goes with --vllm")
    if output and output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file; name a directory")
    try:  # before the generator is loaded, which takes seconds
        listener = socket.create_server((host, port), family=addresses[0][0], backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # `strerror` has the address once more
        raise UsageError(f"--host {host} --port {port}: {reason}") from None

    import uvicorn

    from loragen.core.base.load import quiet_libraries
    from loragen.core.generator.model import Generator
    from loragen.serve.app import Settings, Vllm, make_app
    from loragen.serve.service import AdapterService, Limits

    quiet_libraries()
    generator = Generator.load(file)
    _ = generator.text_encoder  # loaded now, so that a client does not wait for it
    limits = Limits(max_batch, max_queue, keep)
    target = None
    if vllm and output:
        seen = vllm_directory or output.absolute()
        target = Vllm(vllm, seen, os.environ.get(VLLM_KEY) or None)
    settings = Settings(token, timeout, max_bytes, max_prompts, output is not None, target)
    app = make_app(
        lambda observed: AdapterService(generator, file, output, limits, observed), settings
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            limit_concurrency=max(256, 4 * max_queue),
        )
    )

    def stop(number: int, frame: Any) -> None:  # noqa: ARG001
        server.should_exit = True

    # uvicorn has handlers of its own while it serves; it sends itself the signal again afterwards.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    name = f"[{host}]" if ":" in host else host
    render.answer(f"http://{name}:{listener.getsockname()[1]}/v1/adapters")
    server.run(sockets=[listener])
    render.note("stopped; everything that was accepted has been answered")


def _token(file: Path | None) -> str | None:
    """Returns the token of a file or of the environment. Raises UsageError for one that is short,
    or cannot stand in a header."""
    try:
        given = file.read_text(encoding="utf-8") if file else os.environ.get(TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {file}: {getattr(error, 'strerror', error)}") from None
    if given is None:
        return None
    token = given.strip()
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        where = f"--token-file {file}" if file else TOKEN
        raise UsageError(
            f"{where}: a token has at least {SHORTEST_TOKEN} printable characters of ASCII; "
            "make one with: openssl rand -hex 32"
        )
    return token


def _addresses(host: str, port: int) -> list[Any]:
    """Returns what `getaddrinfo` knows of a host to listen on. Raises UsageError if it is none."""
    try:
        kind, flags = socket.SOCK_STREAM, socket.AI_PASSIVE
        return socket.getaddrinfo(host or None, port, type=kind, flags=flags)
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}") from None
