"""The script that init executes in the guest: makes imports cheap, then is the agent.

Under TCG an import statement costs much in its search: path hooks, directory listings, three system calls for each
file. Here every module comes out of one file that the build wrote (`builder/bundle.py`), found by one look into a dict.
Modules that are not in it (C extensions) are found as ever.
"""

import gc
import marshal
import posix
import sys

FOLDER = "/usr/lib/podvisor"
_HEADER = 8  # bytes that hold the length of the index

# Nothing made while modules are imported is garbage, and looking for it costs a tenth of the time.
gc.disable()


class Bundle:
    """An importer whose modules lie in one file: 8 bytes of length, the marshalled index, marshalled code objects."""

    def __init__(self, path: str) -> None:
        self._file = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
        length = int.from_bytes(posix.pread(self._file, _HEADER, 0), "little")
        # name -> (offset, length, file name for tracebacks, is it a package)
        self._index: dict[str, tuple[int, int, str, bool]] = marshal.loads(posix.pread(self._file, length, _HEADER))
        self._start = _HEADER + length
        self._spec_type = type(sys.__spec__)

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """A spec for a module of the bundle, None for others."""
        row = self._index.get(name)
        if row is None:
            return None
        spec = self._spec_type(name, self, origin=row[2], is_package=row[3])
        spec.has_location = True
        if row[3]:
            spec.submodule_search_locations = [row[2].rpartition("/")[0]]
        return spec

    def create_module(self, spec: object) -> None:
        """The usual module object will do."""

    def exec_module(self, module: object) -> None:
        """Runs the module's code in it."""
        offset, length, _, _ = self._index[module.__name__]  # type: ignore[attr-defined]
        code = posix.pread(self._file, length, self._start + offset)
        exec(marshal.loads(code), module.__dict__)


sys.meta_path.insert(0, Bundle(f"{FOLDER}/modules.bundle"))
sys.path.append(FOLDER)

from hypervisor.agent.main import main  # noqa: E402

gc.freeze()
gc.enable()
sys.exit(main())
