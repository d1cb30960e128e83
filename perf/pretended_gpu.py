"""Load on the real server whose GPU is pretended: how calls are queued, batched and ordered, without a GPU.

    python3 perf/pretended_gpu.py --clients 32 --duration 18 --ramp 4
    python3 perf/pretended_gpu.py --set pace_lead_s=inf hold_until_s=0 -- --rate 4 --duration 20

tritonserver, the stages' models, the shared process with its workers and turns, and the load test are the real ones; only the
engines sleep, for as long as a GPU took for Bark large (`gpu_costs.py`), and say nothing (`pretended/pretended_engines.py`). So
nothing here says how fast anything is: it says what a change in scheduling does at costs that were measured once, and how far it
can be believed is in docs/load-history.md. Clips of 10 s with a preset, as on the GPU, of one sentence; `--set max_sentence_s=5`: of
two, as many as the usual text has. Other options are load_test.py's. Table first; then, by stage,
rows a batch and GPU milliseconds a second of audio; last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "pretended")]

from gpu_costs import COSTS  # noqa: E402
from pretended_engines import GPU, SAID  # noqa: E402
from random_checkpoint import write_repository  # noqa: E402
from served_load import drive, must_say, positive  # noqa: E402

from barkstream.profiles import ProfileError, at_least_one, changed, setting  # noqa: E402
from barkstream.server import MODEL_REPOSITORY, Server, prepend  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="parameters of bark's cuda profile"
    )
    parser.add_argument("--streams", type=at_least_one, help="as `barkstream profile --streams`")
    parser.add_argument("--costs", choices=COSTS, default="h100", help="of which GPU, in which profile")
    parser.add_argument("--slower", type=positive, default=1.0, help="kernels take so many times as long")
    parser.add_argument("--kill-after", type=float, metavar="S", help="kill the GPU's process so long into the run")
    parser.add_argument("--repository", type=Path, default=HERE.parent / "build" / "pretended")
    arguments, load = parser.parse_known_args()
    try:
        prepare(arguments.repository, dict(arguments.set), arguments.streams)
    except ProfileError as error:
        parser.error(str(error))
    for folder in (HERE, HERE / "pretended"):
        prepend(os.environ, "PYTHONPATH", folder)
    os.environ[GPU] = f"{arguments.costs} {arguments.slower}"
    with Server(arguments.repository) as server:
        must_say(server, SAID)
        options = ["--model", "large", "--gpu", "pretended", *(word for word in load if word != "--")]
        found = drive(server, options, arguments.kill_after)
    print(json.dumps(found))
    return 0


def prepare(repository: Path, parameters: dict[str, str], n_streams: int | None = None) -> None:
    """A repository of a tiny Bark whose default profile is the cuda one, on no GPU. Raises ProfileError for an unknown parameter."""
    write_repository("tiny", repository)
    for profile in MODEL_REPOSITORY.glob("*/configs/cuda.pbtxt"):
        config = changed(profile, n_streams, parameters).replace("KIND_GPU", "KIND_CPU")
        model = repository / profile.parents[1].name
        shutil.rmtree(model / "configs", ignore_errors=True)
        (model / "config.pbtxt").write_text(config)


if __name__ == "__main__":
    sys.exit(main())
