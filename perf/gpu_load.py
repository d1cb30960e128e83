"""Load on this machine's GPUs: a server with Bark's true sizes and random weights, load_test.py, and what each stage took.

    python3 perf/gpu_load.py -- --rate 1 --duration 60 -- --rate 4 --duration 60 -- --clients 32 --duration 60 --ramp 4
    python3 perf/gpu_load.py --profile cuda-int8 --streams 52 --set pace_lead_s=3 -- --rate 6.8 --duration 30

Behind each `--` stand a run's options, load_test.py's; all runs go to one server. Clips of 10 s with a preset, of one sentence,
for random weights end none; `--set max_sentence_s=5`: of two, as many as the usual text has. Table first; then, by
stage, rows a batch and GPU milliseconds a second of audio; last line JSON, an object a run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from random_checkpoint import SIZES, write_repository  # noqa: E402
from served_load import drive, must_say  # noqa: E402

from barkstream.awake import keep_awake  # noqa: E402
from barkstream.profiles import ProfileError, at_least_one, changed, setting  # noqa: E402
from barkstream.server import MODEL_REPOSITORY, Server  # noqa: E402


def main(said: str = "") -> int:
    """said: what the server's log must have, see `must_say`; nothing in particular, unless told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="large")
    parser.add_argument("--profile", default="cuda", help="cuda, cuda-kv8, cuda-int8, or default: the one for CPUs")
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="parameters of bark's profile"
    )
    parser.add_argument("--streams", type=at_least_one, help="as `barkstream profile --streams`; needs a cuda profile")
    parser.add_argument("--busy-cpus", action="store_true", help="as `barkstream serve --busy-cpus`")
    parser.add_argument("--kill-after", type=float, metavar="S", help="kill one GPU's process so long into each run")
    parser.add_argument("--repository", type=Path, help="default: build/bark-MODEL-random, made if it is not there")
    own, runs = runs_of(sys.argv[1:])
    arguments = parser.parse_args(own)
    if not runs:
        parser.error("no run: give load_test.py's options behind --")
    repository = arguments.repository or HERE.parent / "build" / f"bark-{arguments.model}-random"
    profile = None if arguments.profile == "default" else arguments.profile
    write_repository(arguments.model, repository)
    if arguments.streams and not profile:
        parser.error("--streams needs a cuda profile: elsewhere an instance takes many calls at once")
    if arguments.kill_after is not None and not profile:
        parser.error("--kill-after needs a cuda profile: elsewhere no process holds all of a GPU's engines")
    try:
        refresh_configs(repository, profile, dict(arguments.set), arguments.streams)
    except ProfileError as error:
        parser.error(str(error))
    began = time.monotonic()
    with keep_awake() if arguments.busy_cpus else nullcontext(), Server(repository, profile=profile) as server:
        must_say(server, said)
        print(f"{arguments.model}, {arguments.profile}: ready after {time.monotonic() - began:.1f} s", flush=True)
        note = " ".join(
            [
                arguments.profile,
                *[f"{arguments.streams} streams"] * bool(arguments.streams),
                *(f"{name}={value}" for name, value in arguments.set),
                *["busy CPUs"] * arguments.busy_cpus,
                *[f"a GPU's process killed after {arguments.kill_after} s"] * (arguments.kill_after is not None),
            ]
        )
        found = [
            drive(server, ["--model", arguments.model, "--note", note, *run], arguments.kill_after) for run in runs
        ]
    print(json.dumps(found))
    return 0


def runs_of(words: list[str]) -> tuple[list[str], list[list[str]]]:
    """Our own options, and each run's."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    return groups[0], [group for group in groups[1:] if group]


def refresh_configs(
    repository: Path, profile: str | None, parameters: dict[str, str], n_streams: int | None = None
) -> None:
    """Today's configs in place of those from when the weights were written. Raises ProfileError for an unknown parameter."""
    for model in (path.parent for path in MODEL_REPOSITORY.glob("*/config.pbtxt")):
        shutil.copy(model / "config.pbtxt", repository / model.name)
        shutil.copytree(model / "configs", repository / model.name / "configs", dirs_exist_ok=True)
    for config in repository.glob(f"*/configs/{profile}.pbtxt" if profile else "bark/config.pbtxt"):
        config.write_text(changed(config, n_streams, parameters))


if __name__ == "__main__":
    sys.exit(main())
