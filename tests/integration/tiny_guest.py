"""Guests of some fifty bytes: what happens to a VM is tried in half a second, where Linux would take five.

Each is a multiboot image: QEMU's firmware starts it in 32-bit mode. It prints its text on the serial port, then acts.
"""

from __future__ import annotations

import struct
from pathlib import Path

from hypervisor.vmm.guest import GuestImage

_LOAD = 0x100000
_HEADER = struct.Struct("<8I")
_MAGIC, _HAS_ADDRESSES = 0x1BADB002, 0x10000

#: cli; hlt; jump to the hlt
HALT = bytes.fromhex("fa f4 eb fd")
#: the keyboard controller pulls the CPU's reset line
RESET = bytes.fromhex("b0 fe e6 64") + HALT
#: ACPI: PM1a control := sleep state 5, sleep enable
POWER_OFF = bytes.fromhex("66 ba 04 06 66 b8 00 20 66 ef") + HALT
#: back to the beginning, for ever
AGAIN = b""


def tiny_guest(folder: Path, text: str = "tiny guest is up\n", then: bytes = HALT) -> GuestImage:
    """A guest image in `folder` whose kernel prints `text` and then runs the machine code `then`."""
    folder.mkdir(exist_ok=True)
    kernel, initrd, root = folder / "kernel", folder / "initrd", folder / "root"
    kernel.write_bytes(_multiboot(text.encode(), then))
    initrd.write_bytes(b"nothing".ljust(512))
    root.write_bytes(bytes(4096))
    folder.chmod(0o755)
    return GuestImage(folder, kernel, initrd, root, "tiny", 1)


def _multiboot(text: bytes, then: bytes) -> bytes:
    entry = _LOAD + _HEADER.size
    code = _print(entry, text, then)
    end = entry + len(code)
    checksum = -(_MAGIC + _HAS_ADDRESSES) & 0xFFFFFFFF
    return _HEADER.pack(_MAGIC, _HAS_ADDRESSES, checksum, _LOAD, _LOAD, end, end, entry) + code


def _print(at: int, text: bytes, then: bytes) -> bytes:
    def code(message: int) -> bytes:
        return (
            b"\xbe" + struct.pack("<I", message)  # mov esi, message
            + bytes.fromhex("66 ba f8 03")  # mov dx, 0x3f8
            + bytes.fromhex("ac 84 c0 74 03 ee eb f8")  # next: lodsb; test al, al; jz end; out dx, al; jmp next
        )  # fmt: skip

    length = len(code(0))
    tail = then or b"\xeb" + struct.pack("<b", -(length + 2))  # jmp to the beginning
    return code(at + length + len(tail)) + tail + text + b"\0"
