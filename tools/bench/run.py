"""``make bench``: runs the benchmarks and writes docs/performance.md, its JSON and its plots.

Usage: run.py [--rounds N] [SECTION ...]     sections: see SECTIONS, or --help
"""

from __future__ import annotations

import argparse
import importlib

import report

SECTIONS = {
    "startup": 50,
    "guest_speed": 5,
    "nested": 3,
    "streams": 5,
    "introspect": 3,
    "vsock": 3,
    "page_table": 5,
    "store": 3,
    "memory": 1,
    "rival": 12,
    "sources": 5,
    "faults": 9,
    "apiserver": 3,
    "growth": 5,
    "percpu": 15,
    "nbd": 5,
    "clones": 3,
    "block": 5,
    "filters": 5,
    "snapshot": 5,
    "pod_disks": 10,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all when none is named"
    )
    parser.add_argument("--rounds", type=int, help="samples a case, instead of each section's own number")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in options.sections or SECTIONS:
        print(f"== {name}", flush=True)
        figures = importlib.import_module(name).run(options.rounds or SECTIONS[name])
        for figure in figures:
            print(figure.row())
        report.write({name: figures})


if __name__ == "__main__":
    main()
