"""`barkstream say`: texts in as they come, speech out to a file, standard output and the sound device."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from barkstream import server
from barkstream.clients.client import Client, Stream
from barkstream.clients.encode import FORMATS, open_encoder, wav_header
from barkstream.clients.play import Player
from barkstream.clients.plot import load_matplotlib, plot_speech
from barkstream.clients.protocol import BarkstreamError, Options
from barkstream.clients.report import describe, measure, show_progress

if TYPE_CHECKING:
    from typing_extensions import Self

STDOUT = Path("-")
PAUSE_S = 0.25  # between two texts, as between two sentences
WRAPPED_LINE = 50  # characters; a longer line that ends no sentence goes on in the next one
SENTENCE_MARKS = ".!?…:;。！？"
CLOSERS = "\"'”’»)]」』"
MAX_REQUEST = 20_000  # characters of a file that go in one request: about 20 minutes of speech, 130 MB at the client


def say(arguments: argparse.Namespace) -> int:
    """Speak text after text, write and play it, report."""
    out, format = choose_output(arguments)
    check_folders(out, arguments.plot, arguments.save_voice)
    if arguments.plot:
        load_matplotlib()  # its absence is said now, not after the speech
    measured: list[dict[str, Any]] = []
    with open_client(arguments) as client, contextlib.ExitStack() as stack:
        rate, options = client.sample_rate, options_of(arguments)
        sinks: list[Any] = [stack.enter_context(File(out, format, rate))] if out else []
        if arguments.play:
            sinks.append(stack.enter_context(Player(rate)))
        for text in read_texts(arguments):
            if measured:
                _write(sinks, np.zeros(round(PAUSE_S * rate), np.float32))
            stream = client.stream(text, **options)
            audio = _speak(stream, sinks, rate, keep=bool(arguments.plot and not measured))
            measured.append(measure(stream, rate))
            if len(measured) == 1:
                keep_first(arguments, text, stream, audio, rate, measured[0])
            if arguments.json:
                _print(json.dumps({"out": str(out) if out else None, **measured[-1]}), out)
            options = next_options(options, stream)
    if not arguments.json:
        _print(summary(out, measured), out)
    return 0


def choose_output(arguments: argparse.Namespace) -> tuple[Path | None, str]:
    """Where the speech is written (None: it is only played) and its format, which a file's ending tells.

    Raises BarkstreamError for an ending that is no format.
    """
    out: Path | None = arguments.out
    if arguments.format:
        return out or (None if arguments.play else Path(f"speech.{arguments.format}")), arguments.format
    if out is None:
        return (None if arguments.play else Path("speech.wav")), "wav"
    format = out.suffix[1:].lower().replace("ogg", "opus")
    if out == STDOUT or not format:
        return out, "wav"
    if format not in FORMATS:
        message = f"cannot tell the format of {out}: give --format, one of {', '.join(FORMATS)}"
        raise BarkstreamError(message, "INVALID_ARGUMENT")
    return out, format


def check_folders(*paths: Path | None) -> None:
    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise BarkstreamError(f"cannot write {path}: there is no folder {path.parent}", "INVALID_ARGUMENT")


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


def read_texts(arguments: argparse.Namespace) -> Iterator[str]:
    """What to say, one request each: TEXT; a file, in parts; or standard input, line by line, while it comes.

    Bytes that are no UTF-8 are kept, so that the server can refuse them. Always gives a text, if only a blank one.
    """
    if arguments.file and arguments.text:
        raise BarkstreamError("give TEXT or --file, not both", "INVALID_ARGUMENT")
    if arguments.file:
        texts: Iterable[str] = split_file(arguments.file.read_text("utf-8", "surrogateescape"))
    elif arguments.text not in (None, "-"):
        texts = [arguments.text]
    else:
        texts = sayable(line.decode("utf-8", "surrogateescape") for line in sys.stdin.buffer)
    n = 0
    for n, text in enumerate(texts, 1):  # noqa: B007
        yield text
    if n == 0:
        yield ""


def sayable(lines: Iterable[str]) -> Iterator[str]:
    """Lines as soon as they can be said: one that was wrapped in mid-sentence waits for the next."""
    held = ""
    for line in lines:
        held = f"{held} {line.strip()}".strip()
        ends = held.rstrip(CLOSERS).endswith(tuple(SENTENCE_MARKS))
        if held and (ends or len(line.strip()) <= WRAPPED_LINE):
            yield held
            held = ""
    if held:
        yield held


def split_file(text: str, max_characters: int = MAX_REQUEST) -> Iterator[str]:
    """Whole paragraphs, together at most max_characters, where a paragraph is not longer by itself."""
    held = ""
    for paragraph in filter(str.strip, text.split("\n\n")):
        if held and len(held) + 2 + len(paragraph) > max_characters:
            yield held
            held = ""
        held = f"{held}\n\n{paragraph}" if held else paragraph
    if held:
        yield held


def options_of(arguments: argparse.Namespace) -> Options:
    """The request options among the arguments of `say`."""
    given: dict[str, Any] = {name: getattr(arguments, name, None) for name in Options.__annotations__}
    given["streaming"] = False if arguments.offline else None
    given["speakers"] = dict(_speaker(entry) for entry in arguments.speaker or ()) or None
    one_text = arguments.text not in (None, "-")
    given["return_prompt"] = True if arguments.save_voice or not one_text else None
    return Options(**given)  # type: ignore[typeddict-item]


def next_options(options: Options, said: Stream) -> Options:
    """For the text after `said`: the next seed, and the same voice, where none was asked for."""
    following = options.copy()
    if following["seed"] is not None:
        following["seed"] += 1
    if not following["voice"] and following["history_prompt"] is None:
        following["history_prompt"] = said.history_prompt
    following["return_prompt"] = None
    return following


def keep_first(
    arguments: argparse.Namespace,
    text: str,
    stream: Stream,
    audio: NDArray[np.float32],
    sample_rate: int,
    measured: dict[str, Any],
) -> None:
    """What is asked for of the first text: its picture, its voice."""
    if arguments.plot and audio.size:
        plot_speech(arguments.plot, audio, stream.arrivals, sample_rate, _title(text, measured))
    if arguments.save_voice:
        save_voice(arguments.save_voice, stream.history_prompt)


def save_voice(path: Path, prompt: dict[str, Any] | None) -> None:
    """Keep the speech just made as a voice: .npz in Suno's format."""
    if prompt is None:
        raise BarkstreamError(f"cannot write {path}: the server returned no history prompt", "INTERNAL")
    with open(path, "wb") as file:
        np.savez(file, **prompt)


def summary(out: Path | None, measured: list[dict[str, Any]]) -> str:
    """For people: one speech in full, several in a line."""
    what = describe(measured[0])
    if len(measured) > 1:
        what = f"{len(measured)} texts, {sum(one['audio_s'] for one in measured):.2f} s of speech"
    return what if out in (None, STDOUT) else f"{out}\n{what}"


class File:
    """Speech into a file, or standard output for `-`, made when the first samples come. A context manager."""

    def __init__(self, path: Path, format: str, sample_rate: int):
        self._path, self._format, self._rate = path, format, sample_rate
        self._encoder, self._n_samples = open_encoder(format, sample_rate), 0
        self._file: IO[bytes] | None = None

    def write(self, samples: NDArray[np.float32]) -> None:
        """Append samples [n]. Raises OSError when the file cannot be written."""
        if self._file is None:
            self._file = sys.stdout.buffer if self._path == STDOUT else open(self._path, "wb")  # noqa: SIM115, closed at the end
        self._file.write(self._encoder.encode(samples))
        self._file.flush()  # whoever reads from us plays it now
        self._n_samples += len(samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self._file.write(self._encoder.finish())
        if self._path == STDOUT:
            self._file.flush()
            return
        if self._format == "wav":
            self._file.seek(0)
            self._file.write(wav_header(self._rate, 2 * self._n_samples))
        self._file.close()


def _speak(stream: Stream, sinks: list[Any], sample_rate: int, keep: bool) -> NDArray[np.float32]:
    """One text into all sinks; its samples [n], if they are to be kept."""
    kept = [np.zeros(0, np.float32)]
    for chunk in show_progress(stream, sample_rate):
        _write(sinks, chunk)
        if keep:
            kept.append(chunk)
    return np.concatenate(kept)


def _write(sinks: list[Any], samples: NDArray[np.float32]) -> None:
    for sink in sinks:
        sink.write(samples)


def _print(line: str, out: Path | None) -> None:
    """On standard output, unless the speech is there."""
    print(line, file=sys.stderr if out == STDOUT else sys.stdout, flush=True)


def _speaker(entry: str) -> tuple[str, str | None]:
    name, _, voice = entry.partition("=")
    return name.strip(), voice.strip() or None


def _title(text: str, measured: dict[str, Any]) -> str:
    words = " ".join(text.split())
    said = words if len(words) <= 80 else f"{words[:79]}…"
    ttfa = "" if measured["ttfa_ms"] is None else f" · TTFA {measured['ttfa_ms']:.0f} ms"
    return f"{said}\n{measured['audio_s']:.2f} s · seed {measured['seed']}{ttfa} · RTF {measured['rtf']:.2f}"
