"""``python3 -m builder image|samples``: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from builder.errors import BuildError
from builder.image import Project, build_image
from builder.run import say
from builder.samples import build_samples

_HERE = Path(__file__).resolve().parent.parent


def main() -> int:
    """Builds what the command line names; 0, or 1 after an error line."""
    parser = argparse.ArgumentParser(prog="builder", description="Builds the guest image and the sample images.")
    parser.add_argument("what", choices=("image", "samples"))
    parser.add_argument("--out", type=Path, default=_HERE / "out", help="folder for the result (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for Debian packages (default: cache in --out)")
    parser.add_argument("--force", action="store_true", help="build even what is up to date")
    options = parser.parse_args()
    out: Path = options.out
    cache: Path = options.cache or out / "cache"
    try:
        if options.what == "image":
            build_image(Project(_HERE.parent), out, cache, force=options.force)
        else:
            build_samples(out / "samples", cache, force=options.force)
    except BuildError as e:
        say(f"error: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
