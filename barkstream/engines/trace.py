"""What each batch of a GPU's stages held, and what its calls had waited for: set BARKSTREAM_TRACE to a file, which gets a line a batch.

    {"gpu": 0, "stage": "codec", "began_s": 41.2031, "ended_s": 41.2072, "is_halted": false,
     "calls": [{"rank": 0, "came_s": 41.2012, "since_s": 41.2012, "n_frames": 29}]}

Seconds of time.monotonic() (the machine's, so all processes have the same), `since_s`: since when the call waited, for its first piece
or its next; `rank`: of `workers.py`, 0 goes first. GPTs' rows have stream, position and n_tokens in place of n_frames. A fine window's
n_frames are those that it asks for. A file that cannot be written is told of once, and no more. `perf/trace_report.py` makes a table of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from barkstream.engines import Row, Window, Windows
from barkstream.engines.turns import Turn
from barkstream.engines.workers import n_asked

TRACE = "BARKSTREAM_TRACE"
DIGITS = 4  # of a second

Tell = Callable[[Sequence[Any], Turn], None]  # of a batch's calls, with rank, came_s and since_s, when its turn is over


def open_trace(stage: str, gpu: int) -> Tell | None:
    """What a stage's worker tells of its batches; None unless BARKSTREAM_TRACE says where, and that can be written."""
    path = os.environ.get(TRACE)
    if not path:
        return None
    try:
        file = open(path, "ab", buffering=0)  # noqa: SIM115  # for as long as the process lives
    except OSError as error:
        print(f"no trace of {stage}: {error}", file=sys.stderr, flush=True)
        return None
    is_written = True

    def tell(batch: Sequence[Any], turn: Turn) -> None:
        nonlocal is_written
        if not is_written:
            return
        told = {
            "gpu": gpu,
            "stage": stage,
            "began_s": round(turn.began_s, DIGITS),
            "ended_s": round(time.monotonic(), DIGITS),
            "is_halted": turn.is_halted,
            "calls": [
                {
                    "rank": each.rank,
                    "came_s": round(each.came_s, DIGITS),
                    "since_s": round(each.since_s, DIGITS),
                    **what(each.call),
                }
                for each in batch
            ],
        }
        try:
            file.write(json.dumps(told).encode() + b"\n")
        except OSError as error:  # a full disk must not stop the stage
            is_written = False
            print(f"no more of the trace of {stage}: {error}", file=sys.stderr, flush=True)

    return tell


def what(call: Any) -> dict[str, int]:
    """Of a Row its stream, position and tokens; of a Window, Windows or Chunk frames."""
    if isinstance(call, Row):
        return {"stream": call.stream, "position": call.position, "n_tokens": call.n_tokens}
    return {"n_frames": n_asked(call) if isinstance(call, (Window, Windows)) else call.codes.shape[1]}
