"""The 13 languages that Bark speaks: which one a voice or a text is in."""

from __future__ import annotations

import re

LANGUAGES = {
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "tr": "Turkish",
    "zh": "Chinese",
}

VOICE_TAG = re.compile(rf"(?:^|/)({'|'.join(LANGUAGES)})[_/-]")  # v2/de_speaker_3, de/anna
SCRIPTS = {  # kana before Han: Japanese has both
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "ko": re.compile(r"[\uac00-\ud7af]"),
    "zh": re.compile(r"[\u3400-\u9fff]"),
    "hi": re.compile(r"[\u0900-\u097f]"),
    "ru": re.compile(r"[\u0400-\u04ff]"),
}
N_LOOKED_AT = 1000  # characters of a text
LEAST_SHARE = 0.2  # of its letters: a foreign word does not make a text foreign


def language_of_voice(name: str) -> str | None:
    """The language that a voice's name begins with, or None: "v2/de_speaker_3" is "de"."""
    found = VOICE_TAG.search(name)
    return found[1] if found else None


def language_of_script(text: str) -> str | None:
    """The language that a text's letters tell, or None: Latin ones may be any of the others."""
    beginning = text[:N_LOOKED_AT]
    n_least = LEAST_SHARE * sum(map(str.isalpha, beginning))
    return next((language for language, script in SCRIPTS.items() if len(script.findall(beginning)) > n_least), None)


def choose_language(asked: str | None, voice: str | None, text: str) -> str:
    """The language to read a text in: the one asked for, else its script's, else the voice's, else English."""
    return asked or language_of_script(text) or voice or "en"
