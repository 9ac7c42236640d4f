"""A WebSocket client (RFC 6455) in a page, for the tests that speak to a local ComfyUI or browser."""

from __future__ import annotations

import base64
import os
import socket
import struct
from urllib.parse import urlsplit

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class WebSocket:
    """A connection to `ws://host:port/path`. Every wait ends after `timeout` seconds, with `TimeoutError`."""

    def __init__(self, url: str, timeout: float = 60) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=timeout)
        self._buffer = b""
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET {path} HTTP/1.1", f"Host: {parts.netloc}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        while b"\r\n\r\n" not in self._buffer:
            self._read()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.splitlines()[0]:
            raise ConnectionError(head.decode(errors="replace"))

    def send(self, text: str) -> None:
        """One text message."""
        self._send(TEXT, text.encode())

    def receive(self) -> str | bytes:
        """The next message: `str` for text, `bytes` for binary ones."""
        message, kind = b"", 0
        while True:
            first, second = self._take(2)
            length = second & 127
            if length > 125:
                length = int.from_bytes(self._take(2 if length == 126 else 8))
            payload = self._take(length)  # a server does not mask
            opcode = first & 15
            if opcode == PING:
                self._send(PONG, payload)
            elif opcode == CLOSE:
                raise ConnectionError("the server closed the connection")
            elif opcode != PONG:
                kind = opcode or kind  # 0 goes on with the message before
                message += payload
                if first & 128:
                    return message.decode() if kind == TEXT else message

    def close(self) -> None:
        """End the connection without ceremony."""
        self._socket.close()

    def _send(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", 128 | opcode, 128 | size)
        elif size < 65536:
            head = struct.pack("!BBH", 128 | opcode, 128 | 126, size)
        else:
            head = struct.pack("!BBQ", 128 | opcode, 128 | 127, size)
        self._socket.sendall(head + bytes(4) + payload)  # a mask of zeros leaves the payload as it is

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._read()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _read(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the connection ended")
        self._buffer += data
