"""`barkstream gateway`: its arguments, and the process that serves."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import threading
from dataclasses import replace
from pathlib import Path

from barkstream import server
from barkstream.clients.gateway.settings import Settings, read_keys
from barkstream.clients.protocol import BarkstreamError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXTRA = ("starlette", "uvicorn", "websockets", "av")
DRAIN_S = 5  # how long speech under way may go on when the gateway is told to stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags; its defaults are those of `Settings`."""
    defaults = Settings()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="0: any free one (default: %(default)s)")
    parser.add_argument("--url", default=defaults.url, help="host:port of the server's gRPC (default: %(default)s)")
    parser.add_argument(
        "--serve", action="store_true", help="start the server too, on the port of --url and its neighbours"
    )
    parser.add_argument("--model-repository", type=Path, default=defaults.repository, metavar="FOLDER",
                        help="where the voices' names are (default: %(default)s)")  # fmt: skip
    parser.add_argument("--model-config-name", metavar="PROFILE", help="with --serve: use configs/PROFILE.pbtxt")
    parser.add_argument("--api-keys", type=Path, metavar="FILE", help="require one of the API keys in FILE, one a line")
    parser.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN",
                        help="let pages of this site call, such as https://example.org; may be repeated")  # fmt: skip
    parser.add_argument("--requests-per-minute", type=int, default=defaults.requests_per_minute, metavar="N",
                        help="of one key, or of one address; 0: no limit (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-characters", type=int, default=defaults.max_characters, metavar="N",
                        help="of one input (default: %(default)s)")  # fmt: skip
    parser.set_defaults(command=gateway)


def gateway(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM (returns 0), or until a server that it started ends (its status).

    Raises BarkstreamError or ServerError for what cannot work.
    """
    check_installed()
    settings = settings_of(arguments)
    if arguments.host not in LOOPBACK and not settings.api_keys:
        print(f"anybody who reaches {arguments.host} may speak: see --api-keys", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt), server.sigterm_as_interrupt(), contextlib.ExitStack() as stack:
        if not arguments.serve:
            return run(settings, arguments.host, arguments.port)
        print("starting Triton ...", file=sys.stderr, flush=True)
        speech_server = stack.enter_context(new_server(arguments))
        return run(replace(settings, url=speech_server.grpc_url), arguments.host, arguments.port, speech_server)
    return 0


def check_installed() -> None:
    """BarkstreamError if a package of the extra `gateway` is missing, before anything is started."""
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        message = f"the gateway needs {', '.join(missing)}: pip install 'barkstream[gateway]'"
        raise BarkstreamError(message, "INVALID_ARGUMENT")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Raises BarkstreamError for a file of keys that holds none."""
    try:
        keys = read_keys(arguments.api_keys) if arguments.api_keys else ()
    except ValueError as error:
        raise BarkstreamError(str(error), "INVALID_ARGUMENT") from None
    return Settings(
        url=arguments.url,
        repository=arguments.model_repository,
        api_keys=keys,
        cors_origins=tuple(arguments.cors_origin),
        requests_per_minute=arguments.requests_per_minute,
        max_characters=arguments.max_characters,
    )


def new_server(arguments: argparse.Namespace) -> server.Server:
    """A server for --url: gRPC on its port, health on the one below, metrics on the one above; 0: any free ones."""
    host, _, port = arguments.url.rpartition(":")
    if not (host and port.isdecimal()):
        raise BarkstreamError(f"--url must be host:port, got {arguments.url!r}", "INVALID_ARGUMENT")
    grpc_port = int(port)
    return server.Server(
        arguments.model_repository, profile=arguments.model_config_name, host=host, log=sys.stderr,
        grpc_port=grpc_port, http_port=max(0, grpc_port - 1), metrics_port=grpc_port and grpc_port + 1,
    )  # fmt: skip


def run(settings: Settings, host: str, port: int, speech_server: server.Server | None = None) -> int:
    """Serve in the foreground. Ends with `speech_server`, if one is given, and returns its status."""
    import uvicorn

    from barkstream.clients.gateway.app import create_app

    config = uvicorn.Config(
        create_app(settings), log_level="warning", ws_max_size=settings.max_body_bytes, server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )  # fmt: skip
    web, status = uvicorn.Server(config), 0

    def stop_with_server(running: server.Server) -> None:
        nonlocal status
        status = running.wait()
        web.should_exit = True

    if speech_server is not None:
        threading.Thread(target=stop_with_server, args=(speech_server,), daemon=True).start()
    with server.bound_socket(host, port) as listener:
        listener.listen()  # so that who connects now need only wait
        name = f"[{host}]" if ":" in host else host
        print(f"ready: http://{name}:{listener.getsockname()[1]}/ (page), /v1/audio/speech (OpenAI's API)")
        print("Ctrl-C stops it", flush=True)
        web.run(sockets=[listener])
    if status:
        print(f"the speech server ended with status {status}", file=sys.stderr)
    return status
