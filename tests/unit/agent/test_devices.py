"""The device program, run by a small interpreter of the instructions that it uses."""

from __future__ import annotations

import struct

import pytest

from hypervisor.agent.devices import program

MKNOD, READ, WRITE = 1, 2, 4
BLOCK, CHAR = 1, 2


def run(code: bytes, access: int, kind: int, major: int, minor: int) -> int:
    context = struct.pack("III", access << 16 | kind, major, minor)
    registers, at = [0] * 11, 0
    while True:
        operation, pair, offset, value = struct.unpack_from("<BBhi", code, at * 8)
        to, source = pair & 15, pair >> 4
        at += 1
        if operation == 0x95:
            return registers[0]
        if operation == 0x61:
            (registers[to],) = struct.unpack_from("I", context, offset)
        elif operation == 0xBF:
            registers[to] = registers[source]
        elif operation == 0x57:
            registers[to] &= value
        elif operation == 0x77:
            registers[to] >>= value
        elif operation == 0xB7:
            registers[to] = value
        elif (operation, registers[to] == value) in ((0x15, True), (0x55, False)):
            at += offset


@pytest.mark.parametrize("device", [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, 0), (136, 77)])
def test_harmless_devices_may_be_opened(device: tuple[int, int]) -> None:
    for access in (READ, WRITE, READ | WRITE, READ | WRITE | MKNOD):
        assert run(program(), access, CHAR, *device) == 1


@pytest.mark.parametrize("device", [(1, 1), (1, 2), (1, 4), (1, 11), (5, 1), (5, 3), (10, 200), (10, 229), (254, 0)])
def test_others_may_not(device: tuple[int, int]) -> None:
    assert run(program(), READ, CHAR, *device) == 0
    assert run(program(), WRITE, CHAR, *device) == 0


@pytest.mark.parametrize("device", [(1, 3), (136, 0), (254, 0)])
def test_disks_may_not(device: tuple[int, int]) -> None:
    assert run(program(), READ, BLOCK, *device) == 0


def test_any_node_may_be_made_without_being_opened() -> None:
    assert run(program(), MKNOD, BLOCK, 254, 0) == 1
    assert run(program(), MKNOD, CHAR, 10, 229) == 1
    assert run(program(), MKNOD | READ, BLOCK, 254, 0) == 0
