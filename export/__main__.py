"""`python -m barkstream.export CHECKPOINT [--to model_repository]`: a Bark checkpoint -> Triton model repository."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from barkstream.export.sources import add_arguments, open_source
from barkstream.export.write import export


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        export(open_source(args), args.to, args.int8)
    except (ValueError, OSError) as error:
        print(f"barkstream export: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="barkstream export",
        description="Write the ONNX artifacts of a Bark checkpoint into a Triton model repository.",
    )
    add_arguments(p)
    p.add_argument(
        "--to", type=Path, default=Path("model_repository"), help="the model repository (default: %(default)s)"
    )
    p.add_argument(
        "--int8",
        action="store_true",
        help="8-bit weights for the GPTs: about twice the decode speed on a CPU",
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
