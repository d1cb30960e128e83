"""Load on the real server whose GPU is pretended: how calls are queued, batched and ordered, without a GPU.

    python3 perf/pretended_gpu.py --clients 32 --duration 18 --ramp 4
    python3 perf/pretended_gpu.py --set pace_lead_s=inf crowd=0 -- --rate 4 --duration 20

tritonserver, the stages' models, the shared process with its workers and turns, and the load test are the real ones; only the
engines sleep, for as long as a GPU took for Bark large, and say nothing (`pretended/pretended_engines.py`). So nothing here says
how fast anything is: it says what a change in scheduling does at costs that were measured once, and how far it can be believed
is in docs/load.md. Clips of 10 s with a preset, as on the GPU. Other options are load_test.py's. Table first; then, by stage,
rows a batch and GPU milliseconds a second of audio; last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "pretended")]

from pretended_engines import COSTS, GPU, SAID  # noqa: E402
from random_checkpoint import write_repository  # noqa: E402

from barkstream.server import MODEL_REPOSITORY, Server, prepend  # noqa: E402

STAGES = "semantic", "coarse", "fine", "codec"
REQUESTS = [
    "--text",
    "medium",
    "--max-seconds",
    "10",
    "--voice",
    "random",
    "--warmup",
    "2",
    "--model",
    "large",
    "--gpu",
    "pretended",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="parameters of bark's cuda profile"
    )
    parser.add_argument("--costs", choices=COSTS, default="h100", help="of which GPU, in which profile")
    parser.add_argument("--repository", type=Path, default=HERE.parent / "build" / "pretended")
    arguments, load = parser.parse_known_args()
    prepare(arguments.repository, dict(arguments.set))
    prepend(os.environ, "PYTHONPATH", HERE / "pretended")
    os.environ[GPU] = arguments.costs
    with Server(arguments.repository) as server:
        if SAID not in server.log_text:
            raise SystemExit("the stages' process did not get the pretended engines: what it runs is not known")
        before = counters(server.metrics_url)
        command = [sys.executable, HERE / "load_test.py", "--url", server.grpc_url, *REQUESTS]
        ran = subprocess.run([*command, *(word for word in load if word != "--")], stdout=subprocess.PIPE, text=True)
        done = {name: value - before.get(name, 0.0) for name, value in counters(server.metrics_url).items()}
    if ran.returncode:
        return ran.returncode  # it has said why
    *lines, last = ran.stdout.splitlines()
    print("\n".join(lines))
    stages = {stage: share(stage, done) for stage in STAGES}
    for stage, (rows, ms) in stages.items():
        print(f"{stage:9} {rows:5.1f} rows a batch, {ms:5.2f} ms a second of audio")
    print(json.dumps({"rows": json.loads(last), "stages": stages}))
    return 0


def setting(text: str) -> tuple[str, str]:
    """Raises ValueError for what is no NAME=VALUE."""
    name, value = text.split("=", 1)
    return name, value


def prepare(repository: Path, parameters: dict[str, str]) -> None:
    """A repository of a tiny Bark whose default profile is the cuda one, on no GPU. Raises SystemExit for an unknown parameter."""
    write_repository("tiny", repository)
    for profile in MODEL_REPOSITORY.glob("*/configs/cuda.pbtxt"):
        config = profile.read_text().replace("KIND_GPU", "KIND_CPU")
        if profile.parents[1].name == "bark":
            for name, value in parameters.items():
                config, n = re.subn(
                    rf'(key: "{re.escape(name)}" value: {{ string_value: ")[^"]*', rf"\g<1>{value}", config
                )
                if n != 1:
                    raise SystemExit(f"bark's cuda profile has no parameter {name!r}")
        model = repository / profile.parents[1].name
        shutil.rmtree(model / "configs", ignore_errors=True)
        (model / "config.pbtxt").write_text(config)


def counters(metrics_url: str) -> dict[str, float]:
    """Barkstream's counters, each summed over its labels."""
    found: dict[str, float] = {}
    with urllib.request.urlopen(metrics_url) as response:
        for name, value in re.findall(
            r"^barkstream_(\w+_total)(?:{.*})? (\S+)$", response.read().decode(), re.MULTILINE
        ):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def share(stage: str, done: dict[str, float]) -> tuple[float, float]:
    """A stage's rows a batch, and milliseconds of the GPU a second of audio."""
    rows, calls, busy_s = (done.get(f"{stage}_{what}_total", 0.0) for what in ("rows", "calls", "busy_seconds"))
    return round(rows / max(calls, 1), 1), round(1e3 * busy_s / max(done["audio_seconds_total"], 1e-9), 2)


if __name__ == "__main__":
    sys.exit(main())
