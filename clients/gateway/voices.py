"""The voices a listener may choose from."""

from __future__ import annotations

from barkstream.languages import language_of_voice

# OpenAI's names. Programs have them built in, so each stands for one of the presets.
OPENAI_VOICES = (
    "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse",
)  # fmt: skip


def alias_voices(presets: list[str]) -> dict[str, str]:
    """OpenAI's names -> presets: in order, English ones if there are any (`v2/en_speaker_0`), around and around."""
    chosen = [name for name in presets if language_of_voice(name) == "en"] or presets
    if not chosen:
        return {}
    aliases = {alias: chosen[i % len(chosen)] for i, alias in enumerate(OPENAI_VOICES)}
    return {alias: preset for alias, preset in aliases.items() if alias not in presets}


def describe_voice(name: str, stands_for: str | None = None) -> dict[str, str | None]:
    """A voice as /v1/audio/voices lists it. language: as in "de", or None where the preset's name does not tell."""
    alias = {"name": f"{name} ({stands_for})", "alias_of": stands_for} if stands_for else {"name": name}
    return {"id": name, **alias, "language": language_of_voice(stands_for or name)}
