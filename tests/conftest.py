"""What the tests share: the exported embedded checkpoint, and a pipeline over it in this process."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from barkstream.export.__main__ import main as export_main
from barkstream.local import open_pipeline
from barkstream.pipeline import Pipeline
from barkstream.server import Server
from barkstream.voices import HistoryPrompt

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """A shell ignores SIGINT for what it starts in the background; the servers that tests stop with it would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the live server is a server test: `pytest -m "not server"` is the quick part."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the embedded checkpoint in float32, which is what can equal a reference."""
    folder = tmp_path_factory.mktemp("float32")
    unwanted = shutil.ignore_patterns("*.onnx*", "checkpoint.json", "voices", "tokenizer.json", "__pycache__", ".*")
    shutil.copytree(ROOT / "model_repository", folder, dirs_exist_ok=True, ignore=unwanted)
    assert export_main([str(ROOT / "checkpoints" / "nano-bark"), "--to", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def _opened(repository: Path) -> tuple[Pipeline, dict[str, HistoryPrompt]]:
    return open_pipeline(repository)


@pytest.fixture(scope="session")
def pipeline(_opened: tuple[Pipeline, dict[str, HistoryPrompt]]) -> Pipeline:
    """The stages in this process, no server."""
    return _opened[0]


@pytest.fixture(scope="session")
def voices(_opened: tuple[Pipeline, dict[str, HistoryPrompt]]) -> dict[str, HistoryPrompt]:
    return _opened[1]


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Server]:
    """A live tritonserver on free loopback ports, shared by all tests that only talk to it."""
    with Server(repository) as running:
        yield running
