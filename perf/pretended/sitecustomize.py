"""Python imports a module of this name when it starts, if its folder is on PYTHONPATH: `perf/pretended_gpu.py` puts it there.

Only the process that a GPU's stages share gets pretended engines.
"""

import sys

if "barkstream.engines.host" in sys.orig_argv:
    import pretended_engines

    pretended_engines.install()
