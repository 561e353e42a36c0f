"""A TLS connection that behaves towards poll as a socket does. Imported only for a cluster: `ssl` is slow."""

from __future__ import annotations

import socket
import ssl


class TlsSocket:
    """A client's TLS connection.

    Without a time-out it raises `BlockingIOError` where a socket would. Nothing that has been received stays inside TLS
    where poll does not see it, as long as `recv` is asked for no less than a record (16 KiB).
    """

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, timeout: float) -> None:
        """Connects; :raises OSError: nobody listens there, or it is not who it should be (`ssl.SSLError`)"""
        plain = socket.create_connection(address, timeout)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._tls = context.wrap_socket(plain, server_hostname=address[0])
        except BaseException:
            plain.close()
            raise

    def recv(self, size: int) -> bytes:
        """As `socket.socket.recv`."""
        try:
            data = self._tls.recv(size)
            while (left := size - len(data)) > 0 and self._tls.pending():
                data += self._tls.recv(left)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as e:
            raise BlockingIOError from e
        except ssl.SSLEOFError:
            return b""
        return data

    def send(self, data: bytes | memoryview) -> int:
        """As `socket.socket.send`; after a `BlockingIOError` the same bytes must come again."""
        try:
            return self._tls.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as e:
            raise BlockingIOError from e

    def sendall(self, data: bytes) -> None:
        """As `socket.socket.sendall`."""
        self._tls.sendall(data)

    def fileno(self) -> int:
        """For poll."""
        return self._tls.fileno()

    def setblocking(self, flag: bool) -> None:
        """As `socket.socket.setblocking`."""
        self._tls.setblocking(flag)

    def settimeout(self, seconds: float | None) -> None:
        """As `socket.socket.settimeout`."""
        self._tls.settimeout(seconds)

    def gettimeout(self) -> float | None:
        """As `socket.socket.gettimeout`."""
        return self._tls.gettimeout()

    def close(self) -> None:
        """Ends the connection; harmless twice."""
        self._tls.close()
