"""The voices a listener may choose from."""

from __future__ import annotations

from pathlib import Path

# OpenAI's names. Programs have them built in, so each stands for one of the presets.
OPENAI_VOICES = (
    "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse",
)  # fmt: skip


def list_voices(repository: Path) -> list[str]:
    """Names of the presets in a model repository, sorted; empty where there is none (a gateway far from its server)."""
    folder = repository / "bark/1/voices"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.npz"))


def alias_voices(presets: list[str]) -> dict[str, str]:
    """OpenAI's names -> presets: in order, English ones if there are any (`v2/en_speaker_0`), around and around."""
    chosen = [name for name in presets if "en_speaker" in name] or presets
    if not chosen:
        return {}
    aliases = {alias: chosen[i % len(chosen)] for i, alias in enumerate(OPENAI_VOICES)}
    return {alias: preset for alias, preset in aliases.items() if alias not in presets}
