"""Python imports a module of this name when it starts, if its folder is on PYTHONPATH: `perf/slowed_gpu.py` puts it there.

Only the process that a GPU's stages share takes its kernels from elsewhere.
"""

import os
import sys
from pathlib import Path

if "barkstream.engines.host" in sys.orig_argv:
    from barkstream.engines import kernels

    kernels.HERE = Path(os.environ["BARKSTREAM_SLOWED"])
    print(os.environ["BARKSTREAM_SLOWED_SAYS"], file=sys.stderr, flush=True)
