"""The `barkstream` command: say, serve, gateway, export, voices. Exit codes: 0 done, 1 failed (one sentence), 2 wrong usage."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from barkstream import server
from barkstream.clients.client import Client
from barkstream.clients.gateway.command import add_arguments as add_gateway
from barkstream.clients.plot import PlotUnavailable, load_matplotlib, plot_speech
from barkstream.clients.protocol import BarkstreamError, Options
from barkstream.clients.report import describe, measure, show_progress
from barkstream.clients.wav import write_wav

SAMPLING_OPTIONS = [
    ("--seed", int, "repeats a speech; without one, a fresh one is drawn and printed"),
    ("--temperature", float, "of the semantic and coarse stages; 0 takes the likeliest token"),
    ("--fine-temperature", float, "of the fine stage"),
    ("--top-k", int, "draw from the k likeliest tokens"),
    ("--top-p", float, "draw from the likeliest tokens of this total probability"),
    ("--min-eos-p", float, "end as soon as the end token is this likely"),
    ("--max-seconds", float, "of speech"),
    ("--lookahead", int, "semantic tokens that a coarse window waits for; without, as many as the reference reads"),
]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong usage raises SystemExit(2), as argparse does."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command is not export:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (BarkstreamError, server.ServerError, PlotUnavailable, OSError) as error:
        print(f"barkstream: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="barkstream", description="Bark text-to-speech, streamed from Triton.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_say(commands.add_parser("say", help="speak a text into a WAV file"))
    _add_serve(commands.add_parser("serve", help="run the server until Ctrl-C"))
    add_gateway(commands.add_parser("gateway", help="serve OpenAI's speech API and a web page over HTTP"))
    exporter = commands.add_parser("export", help="write a checkpoint into the model repository", add_help=False)
    exporter.set_defaults(command=export)
    lister = commands.add_parser("voices", help="list the voice presets of the model repository")
    _add_repository(lister)
    lister.set_defaults(command=voices)
    return parser


def say(arguments: argparse.Namespace) -> int:
    """Speak, write the WAV, report."""
    text = read_text(arguments.text)
    for path in filter(None, (arguments.out, arguments.plot, arguments.save_voice)):
        if not path.parent.is_dir():
            raise BarkstreamError(f"cannot write {path}: there is no folder {path.parent}", "INVALID_ARGUMENT")
    if arguments.plot:
        load_matplotlib()  # its absence is said now, not after the speech
    with open_client(arguments) as client:
        rate = client.sample_rate
        stream = client.stream(text, **options_of(arguments))
        chunks = list(show_progress(stream, rate))
        audio = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    write_wav(arguments.out, audio, rate)
    measured = measure(stream, rate)
    if arguments.plot and audio.size:
        plot_speech(arguments.plot, audio, stream.arrivals, rate, _title(text, measured))
    if arguments.save_voice:
        save_voice(arguments.save_voice, stream.history_prompt)
    report = (
        json.dumps({"out": str(arguments.out), **measured})
        if arguments.json
        else f"{arguments.out}\n{describe(measured)}"
    )
    print(report)
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Run the server in the foreground; 0 after Ctrl-C, else the server's own status."""
    return server.serve(
        arguments.model_repository,
        profile=arguments.model_config_name,
        host=arguments.host,
        grpc_port=arguments.port,
        http_port=arguments.http_port,
        metrics_port=arguments.metrics_port,
    )


def export(arguments: argparse.Namespace) -> int:
    """Hand over to `python -m barkstream.export`, which has its own arguments."""
    from barkstream.export.__main__ import main as export_main  # imports what only an export needs

    return export_main(arguments.rest)


def voices(arguments: argparse.Namespace) -> int:
    """Print the names of the voice presets, one a line."""
    folder = arguments.model_repository / "bark/1/voices"
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.npz"))
    if not names:
        raise BarkstreamError(f"no voices in {folder}: run `barkstream export CHECKPOINT` first", "NOT_FOUND")
    print("\n".join(names))
    return 0


@contextlib.contextmanager
def open_client(arguments: argparse.Namespace) -> Iterator[Client]:
    """A client of --url, or of a server that lives as long as the block."""
    with contextlib.ExitStack() as stack:
        url = arguments.url
        if arguments.serve:
            print("starting Triton ...", file=sys.stderr, flush=True)
            url = stack.enter_context(
                server.Server(arguments.model_repository, profile=arguments.model_config_name)
            ).grpc_url
        yield stack.enter_context(Client(url))


def read_text(given: str | None) -> str:
    """TEXT, or standard input for none or `-`; bytes that are no UTF-8 are kept, so that the server can refuse them."""
    if given is None or given == "-":
        return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    return given


def options_of(arguments: argparse.Namespace) -> Options:
    """The request options among the arguments of `say`."""
    given: dict[str, Any] = {name: getattr(arguments, name, None) for name in Options.__annotations__}
    given["streaming"] = False if arguments.offline else None
    given["return_prompt"] = True if arguments.save_voice else None
    return Options(**given)  # type: ignore[typeddict-item]


def save_voice(path: Path, prompt: dict[str, Any] | None) -> None:
    """Keep the speech just made as a voice: .npz in Suno's format."""
    if prompt is None:
        raise BarkstreamError(f"cannot write {path}: the server returned no history prompt", "INTERNAL")
    with open(path, "wb") as file:
        np.savez(file, **prompt)


def _add_say(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to say; `-` or nothing: standard input")
    parser.add_argument("-o", "--out", type=Path, default=Path("speech.wav"), help="WAV file (default: %(default)s)")
    parser.add_argument("--voice", help="preset name, see `barkstream voices`")
    parser.add_argument("--history-prompt", metavar="NPZ", help="a voice of your own, as --save-voice writes it")
    parser.add_argument("--save-voice", type=Path, metavar="NPZ", help="keep this speech as a voice")
    for flag, kind, help_text in SAMPLING_OPTIONS:
        parser.add_argument(flag, type=kind, help=help_text)
    parser.add_argument("--offline", action="store_true", help="no streaming: one chunk a sentence, at the end")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw waveform, spectrogram and chunk boundaries")
    parser.add_argument("--json", action="store_true", help="print the measurements as one line of JSON")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC (default: %(default)s)")
    where.add_argument("--serve", "--start-server", action="store_true", help="start a server just for this speech")
    _add_repository(parser)
    _add_profile(parser)
    parser.set_defaults(command=say)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="gRPC; 0: any free one (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, help="health and HTTP (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=8002, help="Prometheus (default: %(default)s)")
    _add_repository(parser)
    _add_profile(parser)
    parser.set_defaults(command=serve)


def _add_repository(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-repository", type=Path, default=server.MODEL_REPOSITORY, metavar="DIR", help="default: %(default)s"
    )


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-config-name", metavar="PROFILE", help="use configs/PROFILE.pbtxt, such as cuda")


def _title(text: str, measured: dict[str, Any]) -> str:
    words = " ".join(text.split())
    said = words if len(words) <= 80 else f"{words[:79]}…"
    ttfa = "" if measured["ttfa_ms"] is None else f" · TTFA {measured['ttfa_ms']:.0f} ms"
    return f"{said}\n{measured['audio_s']:.2f} s · seed {measured['seed']}{ttfa} · RTF {measured['rtf']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
