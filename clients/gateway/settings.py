"""What a gateway is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from barkstream.server import MODEL_REPOSITORY


@dataclass(frozen=True)
class Settings:
    """A deployment's choices. The defaults suit one machine whose users trust one another."""

    url: str = "127.0.0.1:8001"  # host:port of Triton's gRPC
    repository: Path = MODEL_REPOSITORY  # where the voices' names are read, for the server does not tell them
    api_keys: tuple[str, ...] = ()  # none: everybody may speak
    cors_origins: tuple[str, ...] = ()  # sites whose pages may call; none: only the gateway's own page
    max_characters: int = 4096  # of one input, as at OpenAI
    max_body_bytes: int = 64 * 1024
    requests_per_minute: int = 120  # of one key, or one address where there are no keys; 0: no limit


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys from a file, one a line. Raises ValueError if there is none, OSError if the file cannot be read."""
    keys = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not keys:
        raise ValueError(f"{path} holds no API key; write one a line")
    return keys
