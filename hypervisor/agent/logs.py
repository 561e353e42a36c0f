"""Container logs in files: the format, the writer, the reader. Used in the guest and, for archived logs, on the host.

Layout: ``<directory>/<attempt>.log`` is the file being written, ``<attempt>.log.1`` the one before it, and so on; an
attempt is one run of the container (0, 1, ...). An entry is one line, as Kubernetes' container runtimes write them::

    2026-01-02T03:04:05.678901234Z stdout F a whole line, or the end of one
    2026-01-02T03:04:05.678901234Z stderr P a piece that the next entry of its stream continues

What the container wrote is kept byte for byte: a newline stands where an ``F`` entry ends and nowhere else. Every
chunk is written at once, so a prompt without a newline is a ``P`` entry and can be read at once.

A *line* is counted where it ends: at an ``F`` entry, or at the very end of the log after a ``P`` entry.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

MAX_ENTRY = 16 * 1024  # bytes of content of one entry
BLOCK = 64 * 1024
_STAMP = 30  # length of a timestamp
_STREAM = slice(_STAMP + 1, _STAMP + 7)
_TAG = slice(_STAMP + 8, _STAMP + 9)
_DATA = _STAMP + 10
STREAMS = (b"stdout", b"stderr")


class Entry(NamedTuple):
    """One entry.

    :ivar stamp: its time as written, RFC 3339 in UTC with nine decimals
    :ivar stream: ``b"stdout"`` or ``b"stderr"``
    :ivar final: the line ends here
    """

    stamp: bytes
    stream: bytes
    final: bool
    data: bytes

    @property
    def content(self) -> bytes:
        """The container's own bytes, with the newline where it wrote one."""
        return self.data + b"\n" if self.final else self.data


class Selection(NamedTuple):
    """What a reader wants of a log.

    :ivar tail: only so many last lines
    :ivar since_ns: only entries of this time or later, nanoseconds since 1970
    :ivar limit_bytes: at most so many bytes of output, cut exactly
    :ivar timestamps: put the time before each line
    """

    tail: int | None = None
    since_ns: int | None = None
    limit_bytes: int | None = None
    timestamps: bool = False


# ---- entries ---------------------------------------------------------------------------------------------------------


def stamp_of(ns: int) -> bytes:
    """Nanoseconds since 1970 as a timestamp of 30 bytes."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode() + b".%09dZ" % rest


def parse_entry(line: bytes) -> Entry | None:
    """An entry out of a line without its newline; None for a line that is not one (a full disk can cut one)."""
    if len(line) < _DATA or line[_STAMP - 1 : _STAMP + 1] != b"Z " or line[_STREAM] not in STREAMS:
        return None
    tag = line[_TAG]
    if tag not in (b"F", b"P") or line[_DATA - 1 : _DATA] != b" " or line[_STAMP + 7 : _STAMP + 8] != b" ":
        return None
    return Entry(line[:_STAMP], line[_STREAM], tag == b"F", line[_DATA:])


def encode(stream: bytes, data: bytes, stamp: bytes) -> bytes:
    """`data`, a chunk of `stream`, as entries."""
    head = b"%b %b " % (stamp, stream)
    whole, partial = head + b"F ", head + b"P "
    lines = data.split(b"\n")
    rest = lines.pop()
    if len(data) > MAX_ENTRY and (lines or rest):
        return _encode_long(lines, rest, whole, partial)
    out = whole + (b"\n" + whole).join(lines) + b"\n" if lines else b""
    return out + partial + rest + b"\n" if rest else out


def _encode_long(lines: list[bytes], rest: bytes, whole: bytes, partial: bytes) -> bytes:
    """As `encode`, for a chunk in which a line may be longer than an entry: it becomes P entries and one F entry."""
    out: list[bytes] = []
    for line in lines:
        while len(line) > MAX_ENTRY:
            out += (partial, line[:MAX_ENTRY], b"\n")
            line = line[MAX_ENTRY:]
        out += (whole, line, b"\n")
    for start in range(0, len(rest), MAX_ENTRY):
        out += (partial, rest[start : start + MAX_ENTRY], b"\n")
    return b"".join(out)


# ---- files -----------------------------------------------------------------------------------------------------------


def file_name(attempt: int, age: int = 0) -> str:
    """The log file of `attempt` that was rotated away `age` times."""
    return f"{attempt}.log" if age == 0 else f"{attempt}.log.{age}"


def attempts(directory: str) -> list[int]:
    """The attempts that have a log in `directory`, ascending; empty when there is no such directory."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted({int(head) for name in names if (head := name.partition(".log")[0]).isdigit()})


def files(directory: str, attempt: int) -> list[str]:
    """Paths of the attempt's files, oldest first."""
    found = []
    for name in os.listdir(directory):
        head, dot_log, age = name.partition(".log")
        if head == str(attempt) and dot_log and (not age or age[1:].isdigit()):
            found.append((int(age[1:] or 0), name))
    return [f"{directory}/{name}" for _age, name in sorted(found, reverse=True)]


class LogWriter:
    """Writes one attempt's log and rotates it.

    Never raises for a disk that is full or broken: what could not be written is counted in `dropped_bytes`, a half
    written entry is taken back, and the next write tries again.

    :param max_bytes: a file is rotated before it would grow beyond this
    :param max_files: files kept in all, the one being written included
    """

    def __init__(self, directory: str, attempt: int, *, max_bytes: int, max_files: int) -> None:
        self.directory = directory
        self.attempt = attempt
        self.generation = 0  # how often the file was rotated
        self.dropped_bytes = 0
        self.error: OSError | None = None
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._fd = -1
        self._size = 0
        self._second = (-1, b"")

    def write(self, stream: bytes, data: bytes, now_ns: int | None = None) -> None:
        """One chunk of a stream, as it came."""
        try:
            encoded = encode(stream, data, self._stamp(time.time_ns() if now_ns is None else now_ns))
            self._write_rotating(encoded)
        except OSError as e:
            self.dropped_bytes += len(data)
            self.error = e

    def close(self) -> None:
        """Closes the file; a later write opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _stamp(self, ns: int) -> bytes:
        seconds, rest = divmod(ns, 1_000_000_000)
        if seconds != self._second[0]:
            self._second = (seconds, stamp_of(seconds * 1_000_000_000)[:19])
        return self._second[1] + b".%09dZ" % rest

    def _open(self) -> None:
        path = f"{self.directory}/{file_name(self.attempt)}"
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._fd).st_size

    def _write_rotating(self, encoded: bytes) -> None:
        """Writes entries; where they do not fit they are cut between two of them and the file is rotated."""
        while encoded:
            if self._fd < 0:
                self._open()
            room = self._max_bytes - self._size
            if len(encoded) <= room:
                return self._append(encoded)
            cut = encoded.rfind(b"\n", 0, max(room, 0)) + 1
            if not cut and not self._size:  # an entry longer than a file may be
                cut = encoded.index(b"\n") + 1
            if cut:
                self._append(encoded[:cut])
                encoded = encoded[cut:]
            if encoded:
                self._rotate()
        return None

    def _append(self, encoded: bytes) -> None:
        try:
            wrote = os.write(self._fd, encoded)
            if wrote < len(encoded):  # the disk is full: the next write says so
                wrote += os.write(self._fd, encoded[wrote:])
            if wrote < len(encoded):
                raise OSError(28, "No space left on device")
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += wrote

    def _rotate(self) -> None:
        self.close()
        base = f"{self.directory}/{file_name(self.attempt)}"
        oldest = self._max_files - 1
        if oldest == 0:
            os.unlink(base)
        for age in range(oldest, 0, -1):
            younger = f"{base}.{age - 1}" if age > 1 else base
            if os.path.exists(younger):
                os.replace(younger, f"{base}.{age}")
        self.generation += 1


# ---- reading ---------------------------------------------------------------------------------------------------------


class EntryReader:
    """Entries of one open file from an offset on, up to what is there now; may be asked again when the file has grown.

    Lines that are no entries are passed over. Owns `file`.
    """

    def __init__(self, file: IO[bytes], offset: int = 0) -> None:
        self.file = file
        self.offset = offset
        self._rest = b""

    def read(self, end: int | None = None) -> list[Entry]:
        """The entries of the next block, [] at the end of the file.

        :param end: an offset behind an entry, beyond which nothing is read
        """
        while True:
            size = BLOCK if end is None else min(BLOCK, end - self.offset)
            block = os.pread(self.file.fileno(), size, self.offset) if size > 0 else b""
            if not block:
                return []
            self.offset += len(block)
            lines = (self._rest + block).split(b"\n")
            self._rest = lines.pop()
            entries = [entry for line in lines if (entry := parse_entry(line))]
            if entries:
                return entries

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def open_files(directory: str, attempt: int) -> list[EntryReader]:
    """A reader at the beginning of each of the attempt's files, oldest first; the caller closes them."""
    readers: list[EntryReader] = []
    for path in files(directory, attempt):
        try:
            readers.append(EntryReader(open(path, "rb", buffering=0)))  # noqa: SIM115 - owned by the reader
        except FileNotFoundError:  # rotated away just now
            continue
    return readers


def seek_tail(readers: list[EntryReader], count: int) -> None:
    """Moves `readers` (oldest first) to where the last `count` lines begin."""
    left = count + 1  # the line before the first wanted one ends where that one begins
    newest = True
    for i in range(len(readers) - 1, -1, -1):
        reader = readers[i]
        reader.offset, left, newest = _find_line(reader.file.fileno(), left, newest)
        if left == 0:
            for older in readers[:i]:
                older.offset = os.fstat(older.file.fileno()).st_size
            return


def _find_line(fd: int, left: int, newest: bool) -> tuple[int, int, bool]:
    """Scans a file backwards for the `left`-th last end of a line: (offset behind it or 0, ends still wanted, newest).

    `newest` is true while no entry has been seen: the log's last entry ends a line whatever its tag.
    """
    end = os.fstat(fd).st_size
    rest: bytes | None = None  # the line that crosses `end`; None at the file's end, where only a torn one can be
    while end > 0:
        start = max(0, end - BLOCK)
        lines = (os.pread(fd, end - start, start) + (rest or b"")).split(b"\n")
        stop = end + len(rest or b"")
        if rest is None:
            stop -= len(lines.pop()) + 1
        first = 1 if start else 0
        rest = lines[0] if start and lines else b""
        for line in reversed(lines[first:]):
            entry = parse_entry(line)
            if entry and (entry.final or newest):
                left -= 1
                if left == 0:
                    return stop + 1, 0, False
            newest = newest and entry is None
            stop -= len(line) + 1
        end = start
    return 0, left, newest


class Formatter:
    """Turns entries into the text that a user sees. One per reading; `done` once nothing more can come."""

    def __init__(self, selection: Selection) -> None:
        self._since = stamp_of(selection.since_ns) if selection.since_ns is not None else b""
        self._left = selection.limit_bytes
        self._timestamps = selection.timestamps
        self._at_line_start = True
        self.done = selection.limit_bytes == 0

    def format(self, entries: list[Entry]) -> bytes:
        """The text of `entries`."""
        out = []
        for entry in entries:
            if entry.stamp < self._since or self.done:
                continue
            if self._timestamps and self._at_line_start:
                out.append(entry.stamp + b" ")
            out.append(entry.content)
            self._at_line_start = entry.final
        return self._limit(b"".join(out))

    def _limit(self, text: bytes) -> bytes:
        if self._left is None:
            return text
        text = text[: self._left]
        self._left -= len(text)
        self.done = self._left == 0
        return text


def read_log(directory: str, attempt: int, selection: Selection) -> Iterator[bytes]:
    """The text of one attempt's log as it is now, in chunks; nothing when it has none.

    :raises OSError: a file cannot be read
    """
    readers = open_files(directory, attempt)
    try:
        if selection.tail is not None:
            seek_tail(readers, selection.tail)
        formatter = Formatter(selection)
        for reader in readers:
            while not formatter.done and (entries := reader.read()):
                if text := formatter.format(entries):
                    yield text
    finally:
        for reader in readers:
            reader.close()
