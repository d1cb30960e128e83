"""The README's snippets run as they are printed, against the live server."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import wave
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "127.0.0.1:8001"  # what the README says; the tests' server has a free port
README = (ROOT / "README.md").read_text()
SNIPPETS = {
    language: re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for language in ("python", "bash")
}


def test_there_are_snippets():
    assert len(SNIPPETS["python"]) >= 2
    assert len(SNIPPETS["bash"]) >= 1


@pytest.mark.server
@pytest.mark.parametrize("code", SNIPPETS["python"], ids=lambda code: code.splitlines()[-1].strip()[:30])
def test_a_python_snippet_runs(server, code):
    assert ADDRESS in code
    ran = subprocess.run(
        [sys.executable, "-c", code.replace(ADDRESS, server.grpc_url)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.server
@pytest.mark.parametrize("line", [line for block in SNIPPETS["bash"] for line in block.splitlines()])
def test_a_command_runs(server, tmp_path, line):
    program, *arguments = shlex.split(line)
    assert program == ".venv/bin/barkstream"
    command = [sys.executable, "-m", "barkstream.clients.cli", *arguments, "--url", server.grpc_url]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    with wave.open(str(tmp_path / "morning.wav")) as audio:
        assert audio.getframerate() == 24000
        assert audio.getnframes() > 24000
