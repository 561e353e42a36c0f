"""The frame format: round trips, pieces, limits, rubbish."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.agent import wire
from hypervisor.agent.wire import Decoder, Frame, FrameType, WireError

FREE = [t for t in FrameType if t not in (FrameType.RESIZE, FrameType.SIGNAL)]
frames = st.lists(st.tuples(st.sampled_from(FREE), st.binary(max_size=300)))


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(frames, st.lists(st.integers(0, 50)))
def test_frames_survive_any_cutting(wanted: list[tuple[FrameType, bytes]], sizes: list[int]) -> None:
    decoder = Decoder()
    got: list[Frame] = []
    for piece in cut(b"".join(wire.pack(*frame) for frame in wanted), sizes):
        got += decoder.feed(piece)
    assert got == [Frame(*frame) for frame in wanted]
    assert decoder.pending == 0


@given(st.binary(max_size=2000))
def test_rubbish_is_refused_or_waits(data: bytes) -> None:
    decoder = Decoder()
    try:
        decoder.feed(data)
    except WireError:
        with pytest.raises(WireError):
            decoder.feed(b"")
    else:
        assert decoder.pending <= len(data)


@given(st.sampled_from(list(FrameType)), st.integers(0, 2**32 - 1))
def test_a_header_never_allows_more_than_the_limit(kind: FrameType, length: int) -> None:
    try:
        assert wire.parse_header(wire.HEADER.pack(kind, length)) == (kind, length)
        assert length <= wire.LIMITS[kind]
    except WireError as e:
        assert kind.name in str(e)


def test_oversized_payload_is_refused_before_it_is_sent() -> None:
    with pytest.raises(WireError, match="STDIN frame of 262145 bytes; at most 262144"):
        wire.pack(FrameType.STDIN, bytes(wire.MAX_DATA + 1))


@pytest.mark.parametrize("payload", [b"[]", b"3", b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_json_that_is_no_object(payload: bytes) -> None:
    with pytest.raises(WireError, match="payload is"):
        wire.parse_json(payload)


@given(st.dictionaries(st.text(), st.text()))
def test_json_round_trip(value: dict[str, str]) -> None:
    try:
        packed = wire.pack_json(FrameType.EVENT, value)
    except UnicodeEncodeError:
        return  # a lone surrogate that stands for no byte
    assert wire.parse_json(packed[wire.HEADER.size :]) == value


def test_resize_is_clamped() -> None:
    assert wire.parse_resize(wire.pack_resize(100_000, 24)[wire.HEADER.size :]) == (65535, 24)
