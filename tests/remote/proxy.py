"""A TCP proxy that drops connections midway."""

from __future__ import annotations

import contextlib
import socket
import threading


class DroppingProxy:
    """Passes bytes on to a server, and closes every *every*-th connection after some bytes of an answer.

    Attributes
    ----------
    dropped : int
        Connections that were closed midway.
    """

    def __init__(self, address: str, every: int, after: int = 60) -> None:
        host, port = address.removeprefix("http://").split(":")
        self._target, self._every, self._after = (host, int(port)), every, after
        self._lock = threading.Lock()
        self._requests = self.dropped = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()
            while content := client.recv(1 << 16):
                server.sendall(content)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := server.recv(1 << 16):
                with self._lock:
                    self._requests += 1
                    drop = self._requests % self._every == 0
                    self.dropped += drop
                if drop:
                    client.sendall(content[: self._after])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(content)
