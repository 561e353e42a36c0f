"""stub"""

from pathlib import Path


def build_samples(out: Path, cache: Path, *, force: bool = False) -> None: ...
