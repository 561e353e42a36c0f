"""SPDY: the codec against itself, damaged and random input; connections over a pair of in-memory pipes."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import ProtocolError
from hypervisor.introspect.spdy import connection as spdy
from hypervisor.introspect.spdy.connection import SpdyConnection
from hypervisor.introspect.spdy.frames import (
    MAX_FRAME,
    Data,
    Frame,
    FrameReader,
    FrameWriter,
    GoAway,
    Headers,
    Ping,
    RstStream,
    SynReply,
    SynStream,
    WindowUpdate,
)
from hypervisor.introspect.spdy.headers import DICTIONARY, DICTIONARY_ID, MAX_BLOCK, HeaderReader, HeaderWriter


def test_the_dictionary_is_the_one_that_peers_ask_for() -> None:
    assert len(DICTIONARY) == 1423
    assert zlib.adler32(DICTIONARY) == DICTIONARY_ID


stream_ids = st.integers(1, 2**31 - 1)
names = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=12)
headers = st.dictionaries(names, st.text(max_size=40).filter(lambda t: "\0" not in t), max_size=5)
frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(SynStream, stream_ids, headers, st.booleans(), st.booleans(), st.integers(0, 9), st.integers(0, 7)),
    st.builds(SynReply, stream_ids, headers, st.booleans()),
    st.builds(RstStream, stream_ids, st.integers(0, 11)),
    st.builds(Ping, st.integers(0, 2**32 - 1)),
    st.builds(GoAway, stream_ids, st.integers(0, 2)),
    st.builds(Headers, stream_ids, headers, st.booleans()),
    st.builds(WindowUpdate, stream_ids, st.integers(0, 2**31 - 1)),
    st.builds(Data, stream_ids, st.binary(max_size=300), st.booleans()),
)


@given(st.lists(frames, max_size=12), st.integers(1, 50))
def test_frames_come_out_as_they_went_in_whatever_the_pieces(sent: list[Frame], size: int) -> None:
    writer, reader = FrameWriter(), FrameReader()
    data = b"".join(map(writer.render, sent))
    got = [f for start in range(0, len(data), size) for f in reader.feed(data[start : start + size])]
    assert got == sent


@given(st.binary(max_size=200), st.lists(frames, max_size=3), st.data())
def test_no_input_does_worse_than_a_protocol_error(noise: bytes, good: list[Frame], data: st.DataObject) -> None:
    writer = FrameWriter()
    valid = bytearray(b"".join(map(writer.render, good)))
    for _ in range(data.draw(st.integers(0, 4))):
        if valid:
            valid[data.draw(st.integers(0, len(valid) - 1))] = data.draw(st.integers(0, 255))
    for stream in (noise, bytes(valid)):
        reader = FrameReader()
        with contextlib.suppress(ProtocolError):
            list(reader.feed(stream))


def test_a_bomb_is_refused() -> None:
    bomb = zlib.compressobj(zdict=DICTIONARY)
    block = bomb.compress(b"\0" * (64 * MAX_BLOCK)) + bomb.flush(zlib.Z_SYNC_FLUSH)
    with pytest.raises(ProtocolError, match="larger than"):
        HeaderReader().read(block)


def test_a_block_that_claims_too_many_headers_is_refused() -> None:
    packed = zlib.compressobj(zdict=DICTIONARY)
    block = packed.compress(b"\xff\xff\xff\xff") + packed.flush(zlib.Z_SYNC_FLUSH)
    with pytest.raises(ProtocolError, match="claims"):
        HeaderReader().read(block)


def test_blocks_share_one_stream_of_compression() -> None:
    writer, reader = HeaderWriter(), HeaderReader()
    first, second = (writer.write({"streamtype": "stdin"}) for _ in range(2))
    assert len(second) < len(first)
    assert reader.read(first) == reader.read(second) == {"streamtype": "stdin"}


def test_a_frame_that_is_too_large_is_refused_before_it_has_come() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        list(FrameReader().feed(b"\0\0\0\1" + (MAX_FRAME + 1).to_bytes(4, "big")))


def test_another_version_is_refused() -> None:
    with pytest.raises(ProtocolError, match="version 2"):
        list(FrameReader().feed(b"\x80\x02\x00\x06\x00\x00\x00\x04\0\0\0\1"))


# ---- connections -----------------------------------------------------------------------------------------------------


class Pipe:
    """One end of an in-memory transport that holds a few writes before it makes the writer wait."""

    def __init__(self, incoming: asyncio.Queue[bytes], outgoing: asyncio.Queue[bytes]) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    async def read(self) -> bytes:
        return await self._incoming.get()

    async def write(self, data: bytes) -> None:
        await self._outgoing.put(data)

    async def close(self) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._outgoing.put_nowait(b"")


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[SpdyConnection, SpdyConnection]]:
    a: asyncio.Queue[bytes] = asyncio.Queue(4)
    b: asyncio.Queue[bytes] = asyncio.Queue(4)
    client, server = SpdyConnection(Pipe(a, b), server=False), SpdyConnection(Pipe(b, a), server=True)
    tasks = [asyncio.create_task(client.run()), asyncio.create_task(server.run())]
    try:
        yield client, server
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_both_directions_and_half_close() -> None:
    async with pair() as (client, server), asyncio.timeout(10):
        mine = await client.open({"streamType": "stdin"})
        theirs = await server.accept()
        assert theirs is not None
        assert theirs.headers == {"streamtype": "stdin"}
        await mine.write(b"question")
        await mine.close()
        assert await theirs.read() == b"question"
        assert await theirs.read() == b""
        await theirs.write(b"answer")
        await theirs.close()
        assert await mine.read() == b"answer"
        assert await mine.read() == b""
        with pytest.raises(ConnectionError):
            await mine.write(b"late")


async def test_a_slow_reader_stops_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spdy, "BUFFER", 4096)
    async with pair() as (client, server), asyncio.timeout(10):
        mine = await client.open({})
        theirs = await server.accept()
        assert theirs is not None
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await mine.write(b"x" * 1024)
                sent += 1024

        flooding = asyncio.create_task(flood())
        for _ in range(200):
            await asyncio.sleep(0)
        held = sent
        for _ in range(200):
            await asyncio.sleep(0)
        assert sent == held < 64 * 1024
        got = 0
        while got < 2 * held:
            got += len(await theirs.read())
        flooding.cancel()


async def test_an_abandoned_stream_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spdy, "BUFFER", 1024)
    async with pair() as (client, server), asyncio.timeout(10):
        full, other = await client.open({}), await client.open({})
        first, second = await server.accept(), await server.accept()
        assert first is not None
        assert second is not None
        first.abandon()
        await full.write(b"x" * 100_000)
        await other.write(b"through")
        assert await second.read() == b"through"


async def test_a_reset_ends_both_directions() -> None:
    async with pair() as (client, server), asyncio.timeout(10):
        mine = await client.open({})
        theirs = await server.accept()
        assert theirs is not None
        await theirs.cancel()
        assert await mine.read() == b""
        with pytest.raises(ConnectionError):
            await mine.write(b"late")


async def test_streams_out_of_order_end_the_connection() -> None:
    a: asyncio.Queue[bytes] = asyncio.Queue()
    server = SpdyConnection(Pipe(a, asyncio.Queue()), server=True)
    writer = FrameWriter()
    for number in (3, 1):
        a.put_nowait(writer.render(SynStream(number, {})))
    with pytest.raises(ProtocolError, match="out of order"):
        await server.run()
    accepted = await server.accept()
    assert accepted is not None
    assert await accepted.read() == b""
    assert await server.accept() is None


async def test_too_many_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spdy, "MAX_STREAMS", 2)
    async with pair() as (client, _), asyncio.timeout(10):
        streams = [await client.open({}) for _ in range(3)]
        assert await streams[2].read() == b""
        assert streams[2].reset
        assert not streams[1].reset


async def test_a_ping_comes_back() -> None:
    out: asyncio.Queue[bytes] = asyncio.Queue()
    incoming: asyncio.Queue[bytes] = asyncio.Queue()
    server = SpdyConnection(Pipe(incoming, out), server=True)
    writer = FrameWriter()
    for frame in (Ping(1), Ping(2), GoAway(0)):
        incoming.put_nowait(writer.render(frame))
    await server.run()
    assert list(FrameReader().feed(out.get_nowait())) == [Ping(1)]
    assert out.empty()
