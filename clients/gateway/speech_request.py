"""The body of POST /v1/audio/speech, checked field by field."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from barkstream.clients.encode import FORMATS
from barkstream.clients.gateway.errors import ApiError, bad_field
from barkstream.clients.protocol import Options

MODELS = ("bark", "tts-1", "tts-1-hd", "gpt-4o-mini-tts")  # Bark, and the names that OpenAI's clients send by default
OPENAI_FIELDS = ("model", "input", "voice", "instructions", "response_format", "speed", "stream_format")
# Bark's own, for `extra_body` of OpenAI's client; whether a value makes sense is the server's to say.
BARK_FIELDS = {
    "language": str,
    "normalize": bool,
    "guard": bool,
    "seed": int,
    "temperature": float,
    "fine_temperature": float,
    "top_k": int,
    "top_p": float,
    "min_eos_p": float,
    "max_seconds": float,
    "lookahead": int,
}
KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
SLOWEST, FASTEST = 0.25, 4.0


@dataclass(frozen=True)
class SpeechRequest:
    """What to say and how to send it."""

    text: str
    options: Options  # for the speech server
    response_format: str = "mp3"  # one of FORMATS
    speed: float = 1.0  # of speaking; the pitch stays
    events: bool = False  # server-sent events, not bare audio

    @classmethod
    def parse(cls, body: bytes, voice_aliases: dict[str, str], max_characters: int) -> SpeechRequest:
        """A request from JSON. Raises ApiError (400) with the field that is wrong and what would be right."""
        given = read_object(body)
        check_names(given, (*OPENAI_FIELDS, "speakers", *BARK_FIELDS))
        if "model" not in given or given["model"] not in MODELS:
            raise bad_field("model", f"model must be one of {', '.join(MODELS)}, got {given.get('model')!r}")
        if given.get("instructions"):
            raise bad_field("instructions", "Bark follows no instructions; write [laughs] or ... into the input")
        options = read_options(given, voice_aliases)
        options["speakers"] = _read_speakers(given.get("speakers"), voice_aliases)
        return cls(
            read_text(given, max_characters),
            options,
            read_choice(given, "response_format", FORMATS, "mp3"),
            read_number(given, "speed", SLOWEST, FASTEST, 1.0),
            read_choice(given, "stream_format", ("audio", "sse"), "audio") == "sse",
        )


def read_object(body: bytes | str) -> dict[str, Any]:
    """ApiError (400) for what is no JSON object."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8
        raise ApiError(400, f"a request must be JSON: {error}", "invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"a request must be a JSON object, got {type(given).__name__}", "invalid_json")
    return given


def check_names(given: dict[str, Any], known: tuple[str, ...]) -> None:
    """ApiError (400) for a field that does not exist: a misspelt option must not be dropped in silence."""
    if unknown := sorted(set(given) - set(known)):
        raise bad_field(unknown[0], f"no field {unknown[0]!r}; there are {', '.join(known)}")


def read_text(given: dict[str, Any], max_characters: int) -> str:
    text = given.get("input")
    if not isinstance(text, str) or not text.strip():
        raise bad_field("input", "input must be a text with some words to say")
    if len(text) > max_characters:
        raise bad_field("input", f"input must have at most {max_characters:,} characters, got {len(text):,}")
    return text


def read_options(given: dict[str, Any], voice_aliases: dict[str, str]) -> Options:
    """Voice and Bark's own options, as the client library takes them."""
    options: dict[str, Any] = {"voice": _read_voice("voice", given.get("voice"), voice_aliases)}
    for name, kind in BARK_FIELDS.items():
        value = given.get(name)
        if value is not None and not _is(kind, value):
            raise bad_field(name, f"{name} must be {KINDS[kind]}, got {value!r}")
        options[name] = value
    return Options(**options)  # type: ignore[typeddict-item]


def read_choice(given: dict[str, Any], name: str, choices: Collection[str], default: str) -> str:
    value = given.get(name, default)
    if not isinstance(value, str) or value not in choices:
        raise bad_field(name, f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def read_number(given: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise bad_field(name, f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


def _is(kind: type, value: Any) -> bool:
    if kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max  # False for NaN
    return kind in (str, bool) and isinstance(value, kind)


def _read_voice(field: str, voice: Any, aliases: dict[str, str]) -> str | None:
    """A preset's name, which the server matches loosely; None: Bark picks a voice. OpenAI allows {"id": name} as well."""
    if isinstance(voice, dict):
        voice = voice.get("id", voice)
    if voice is not None and not isinstance(voice, str):
        raise bad_field(field, f"{field} must be a name from /v1/audio/voices, got {voice!r}")
    return aliases.get(voice, voice) if voice else None


def _read_speakers(speakers: Any, aliases: dict[str, str]) -> dict[str, str | None] | None:
    """Each speaker's voice. None: there is nobody whose turns the input marks."""
    if speakers is not None and not isinstance(speakers, dict):
        raise bad_field("speakers", f"speakers must be an object of names and their voices, got {speakers!r}")
    return {name: _read_voice("speakers", voice, aliases) for name, voice in (speakers or {}).items()} or None
