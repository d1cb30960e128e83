"""Claims about `barkstream say`, `voices` and `completion`: texts in as they come, speech out in any format."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import types
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from barkstream.clients.cli import main
from barkstream.clients.play import Player, SoundUnavailable
from barkstream.clients.protocol import BarkstreamError
from barkstream.clients.say import STDOUT, File, choose_output, sayable, split_file

ROOT = Path(__file__).resolve().parents[1]
RATE = 24_000
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_wav_file_says_its_length_at_the_end(tmp_path):
    with File(tmp_path / "a.wav", "wav", RATE) as file:
        for chunk in np.array_split(TONE, 5):
            file.write(chunk)
    with wave.open(str(tmp_path / "a.wav")) as audio:
        assert (audio.getnframes(), audio.getframerate()) == (len(TONE), RATE)


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ({}, (Path("speech.wav"), "wav")),
        ({"play": True}, (None, "wav")),
        ({"format": "mp3"}, (Path("speech.mp3"), "mp3")),
        ({"out": Path("a.ogg")}, (Path("a.ogg"), "opus")),
        ({"out": Path("a.FLAC"), "play": True}, (Path("a.FLAC"), "flac")),
        ({"out": STDOUT}, (STDOUT, "wav")),
        ({"out": STDOUT, "format": "pcm"}, (STDOUT, "pcm")),
    ],
)
def test_the_files_ending_is_its_format(given, output):
    assert choose_output(argparse.Namespace(**{"out": None, "format": None, "play": False, **given})) == output


def test_an_ending_that_is_no_format_is_refused():
    with pytest.raises(BarkstreamError, match="cannot tell the format of a.xyz: give --format"):
        choose_output(argparse.Namespace(out=Path("a.xyz"), format=None, play=False))


# --- the sound device ------------------------------------------------------------------------------------------------


class FakeDevice:
    """sounddevice.OutputStream that remembers what it played."""

    def __init__(self, samplerate, channels, dtype):
        self.played, self.calls = [], []
        FakeDevice.last = self

    def write(self, samples):
        self.played.append(samples[:, 0].copy())

    def __getattr__(self, name):  # start, stop, abort, close
        return lambda: self.calls.append(name)


@pytest.fixture
def sound(monkeypatch):
    module = types.SimpleNamespace(OutputStream=FakeDevice, PortAudioError=RuntimeError)
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module


def test_a_player_plays_everything_in_order_before_it_ends(sound):
    with Player(RATE) as player:
        for chunk in np.array_split(TONE, 100):
            player.write(chunk)
    np.testing.assert_array_equal(np.concatenate(FakeDevice.last.played), TONE)
    assert FakeDevice.last.calls == ["start", "stop", "close"]


def test_leaving_with_an_error_is_silence_at_once(sound):
    player = Player(RATE)
    player.write(TONE)
    player.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert FakeDevice.last.calls == ["start", "abort"]


def test_without_a_sound_device_it_is_one_sentence(sound, monkeypatch):
    def no_device(**_):
        raise RuntimeError("no default output device")

    sound.OutputStream = no_device
    with pytest.raises(SoundUnavailable, match="there is no sound device to play on"):
        Player(RATE)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(SoundUnavailable, match=r"pip install 'barkstream\[play\]'"):
        Player(RATE)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_a_line_is_said_as_soon_as_it_is_there():
    came = []

    def lines():
        for line in ("Hello there.\n", "How are you?\n"):
            came.append(line)
            yield line

    texts = sayable(lines())
    assert next(texts) == "Hello there."
    assert len(came) == 1


def test_a_line_that_was_wrapped_waits_for_the_next():
    wrapped = "This line is so long that somebody must have\nwrapped it in the middle of what"
    long = "It is a truth universally acknowledged, that a single man in\npossession of a good fortune, must be in want of a wife.\n"
    assert list(sayable(long.splitlines(True))) == [long.replace("\n", " ").strip()]
    assert list(sayable(["- Milk\n", "- Eggs\n", "\n", "Bye"])) == ["- Milk", "- Eggs", "Bye"]
    assert "".join(sayable(wrapped.splitlines(True))).replace(" ", "") == wrapped.replace("\n", "").replace(" ", "")


def test_a_book_goes_in_parts_of_whole_paragraphs():
    book = "\n\n".join(f"Paragraph {i} of the book." for i in range(1000))
    parts = list(split_file(book, 500))
    assert max(map(len, parts)) <= 500
    assert "\n\n".join(parts) == book


# --- the other commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def empty(repository, tmp_path):
    """A model repository without voices."""
    folder = tmp_path / "bark/1"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_bytes((repository / "bark/1/checkpoint.json").read_bytes())
    return tmp_path


def test_voices_are_added_listed_with_language_and_as_json(repository, empty, capsys):
    source, there = repository / "bark/1/voices/heart_0.npz", ["--model-repository", str(empty)]
    assert main(["voices", *there, "--add", str(source), "--name", "de/anna"]) == 0
    assert main(["voices", *there, "--add", str(source.parent), "--json"]) == 0
    table, listing = capsys.readouterr().out.split("\n", 1)
    assert table.split() == ["de/anna", "German"]
    assert json.loads(listing)[0] == {"name": "de/anna", "language": "de"}
    assert len(json.loads(listing)) == 5


def test_voices_of_another_checkpoint_are_refused_by_name(empty, capsys):
    assert main(["voices", "--model-repository", str(empty), "--add", "suno"]) == 1
    assert "is no voice for this checkpoint: semantic_prompt must hold ids from 0 to 767" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("say", "voices", "--save-voice", "--format"))


def test_bash_accepts_its_completion(capsys):
    main(["completion", "bash"])
    assert subprocess.run(["bash", "-n"], input=capsys.readouterr().out, text=True).returncode == 0


# --- on a live server ------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_lines_are_said_while_more_are_to_come(server, tmp_path):
    command = [sys.executable, "-m", "barkstream.clients.cli", "say", "--url", server.grpc_url, "--json", "--seed", "1"]
    with subprocess.Popen(
        [*command, "-o", str(tmp_path / "a.wav")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        killer = threading.Timer(100, process.kill)
        killer.start()
        process.stdin.write("Good morning to you.\n")
        process.stdin.flush()
        first = json.loads(process.stdout.readline())  # while standard input is open
        process.stdin.write("And good night.\n")
        process.stdin.close()
        second = json.loads(process.stdout.readline())
        assert process.wait(60) == 0
        killer.cancel()
    assert (first["seed"], second["seed"]) == (1, 2)
    with wave.open(str(tmp_path / "a.wav")) as audio:
        assert audio.getnframes() / RATE == pytest.approx(first["audio_s"] + second["audio_s"] + 0.25, abs=0.01)


@pytest.mark.server
def test_speech_on_standard_output_leaves_the_report_to_standard_error(server):
    command = [sys.executable, "-m", "barkstream.clients.cli", "say", "Hello.", "--url", server.grpc_url, "-o", "-"]
    ran = subprocess.run([*command, "--format", "pcm"], capture_output=True, timeout=100, cwd=ROOT)
    assert ran.returncode == 0
    assert np.abs(np.frombuffer(ran.stdout, "<i2")).max() > 1000
    assert b"TTFA" in ran.stderr


@pytest.mark.server
def test_a_file_is_played_and_written_in_one_go(server, sound, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Good morning to you.\n\nAnd good night.")
    options = ["--url", server.grpc_url, "--voice", "Heart 0", "--play", "-o", str(tmp_path / "a.opus")]
    assert main(["say", "--file", str(tmp_path / "a.txt"), *options]) == 0
    played = np.concatenate(FakeDevice.last.played)
    with av.open(str(tmp_path / "a.opus")) as container:
        seconds = sum(frame.samples for frame in container.decode(audio=0)) / 48_000
    assert seconds == pytest.approx(len(played) / RATE, abs=0.1)
    assert "audio" in capsys.readouterr().out


@pytest.mark.server
def test_playing_without_a_device_fails_before_anything_is_said(server, sound, capsys, tmp_path):
    def no_device(**_):
        raise RuntimeError("none")

    sound.OutputStream, start = no_device, time.monotonic()
    assert main(["say", "Hello.", "--url", server.grpc_url, "--play", "-o", str(tmp_path / "a.wav")]) == 1
    assert capsys.readouterr().err.startswith("barkstream: there is no sound device")
    assert time.monotonic() - start < 5
    assert not (tmp_path / "a.wav").exists()
