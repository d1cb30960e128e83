"""Messages to and from a GPU's process, framed as multiprocessing.connection's; there nobody lets go of Python to read or send one.

Every read and write by Python's own modules lets go of its lock, and another thread may keep it for a while. So one thread reads for
all connections, whoever has an answer sends it, and both ask the C library themselves, holding the lock for the few microseconds that
it takes. What that gains is in docs/performance.md.
"""

from __future__ import annotations

import ctypes
import errno
import pickle
import select
import socket
import struct
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 18
SEND_BUFFER_BYTES = 1 << 20  # asked for: whoever sends does not wait, the rest is sent by another thread
BACKLOG = 128
PROTOCOL = 5  # of pickle: the other end's Python may be another one
_LENGTH = struct.Struct("!i")  # before a message; -1: a longer one, whose length follows
_LONG_LENGTH = struct.Struct("!Q")
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the lock
_libc.recv.argtypes = _libc.send.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.recv.restype = _libc.send.restype = ctypes.c_ssize_t


class Line:
    """The GPU's process' end of a connection. Whoever likes may send; one thread reads."""

    def __init__(self, connected: socket.socket):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._socket, self.fileno = connected, connected.fileno()
        self._received = bytearray()
        self._sending = threading.Lock()
        self._unsent = bytearray()
        self._is_open = True

    def close(self) -> None:
        """What is sent afterwards is lost."""
        with self._sending:
            self._is_open = False
            self._socket.close()

    def send(self, message: Any) -> bool:
        """Whether all of it could be sent at once: else `flush` has to be called, by somebody who may wait."""
        data = _framed(message)
        with self._sending:
            if self._unsent:
                self._unsent += data
                return True  # whoever flushes sees to it
            rest = self._send_now(data)
            self._unsent += rest
            return not rest

    def flush(self) -> None:
        """Send what is left, however long the other end takes to read it."""
        poll = select.poll()
        while True:
            with self._sending:
                if not self._is_open:
                    return
                self._unsent = bytearray(self._send_now(bytes(self._unsent)))
                if not self._unsent:
                    return
                poll.register(self.fileno, select.POLLOUT)
            poll.poll(1000)

    def _send_now(self, data: bytes) -> bytes:
        """What of it is not sent; nothing if the other end has gone."""
        n_sent = _libc.send(self.fileno, data, len(data), _FLAGS) if self._is_open else len(data)
        if n_sent >= 0:
            return data[n_sent:]
        return data if ctypes.get_errno() in (errno.EAGAIN, errno.EINTR) else b""

    def receive(self, memory: ReadMemory) -> tuple[list[Any], bool]:
        """Messages that are there, and whether the other end has gone behind them."""
        n_read = _libc.recv(self.fileno, memory.address, READ_BYTES, _FLAGS)
        if n_read < 0 and ctypes.get_errno() in (errno.EAGAIN, errno.EINTR):
            return [], False
        if n_read > 0:
            self._received += memory.view[:n_read]
        messages, start = [], 0
        while (found := _message_at(self._received, start)) is not None:
            begin, start = found
            messages.append(pickle.loads(memoryview(self._received)[begin:start]))
        del self._received[:start]
        return messages, n_read <= 0


class Caller:
    """The other end of a `Line`, of somebody who asks and waits. One thread at a time may use it.

    As multiprocessing's `Connection`, with a system call less for an answer, and plain pickle.
    """

    def __init__(self, path: Path):
        """Raises FileNotFoundError or ConnectionRefusedError if nobody listens there."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise
        self._memory = ReadMemory()
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __del__(self) -> None:
        self.close()  # whoever opened it may just let go of it

    def send(self, message: Any) -> None:
        """Returns when all of it is on its way. Raises OSError if the other end has gone."""
        self._socket.sendall(_framed(message))

    def receive(self) -> Any:
        """Waits for the next message. Raises EOFError or OSError if the other end has gone."""
        while (found := _message_at(self._received, 0)) is None:
            n_read = self._socket.recv_into(self._memory.view)
            if not n_read:
                raise EOFError("the process at the other end has ended")
            self._received += self._memory.view[:n_read]
        begin, end = found
        message = pickle.loads(memoryview(self._received)[begin:end])
        del self._received[:end]
        return message


def _framed(message: Any) -> bytes:
    data = pickle.dumps(message, PROTOCOL)  # multiprocessing's own takes up to twice as long
    length = _LENGTH.pack(len(data)) if len(data) < 1 << 31 else _LENGTH.pack(-1) + _LONG_LENGTH.pack(len(data))
    return length + data


class ReadMemory:
    """Where bytes are read to."""

    def __init__(self) -> None:
        memory = bytearray(READ_BYTES)
        self.view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _message_at(data: bytearray, start: int) -> tuple[int, int] | None:
    """Where the message that begins with its length at `start` begins and ends, if all of it is there."""
    begin = start + _LENGTH.size
    if len(data) < begin:
        return None
    (n,) = _LENGTH.unpack_from(data, start)
    if n == -1:
        if len(data) < begin + _LONG_LENGTH.size:
            return None
        (n,) = _LONG_LENGTH.unpack_from(data, begin)
        begin += _LONG_LENGTH.size
    return (begin, begin + n) if len(data) >= begin + n else None


class Reader:
    """Accepts connections on a socket's path, and reads them all."""

    def __init__(self, path: Path):
        """Raises OSError if it cannot listen there."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen(BACKLOG)
        self._poll = select.epoll()
        self._poll.register(self._listening, select.EPOLLIN)
        self._lines: dict[int, Line] = {}

    def read(
        self, joined: Callable[[Line], None], said: Callable[[Line, Any], None], gone: Callable[[Line], None]
    ) -> None:
        """For ever. joined: a line is new; said: a message; gone: the line is closed, by the other end or because of what it said."""
        memory = ReadMemory()
        while True:
            for fileno, _ in self._poll.poll():
                if fileno == self._listening.fileno():
                    joined(self._accept())
                    continue
                line = self._lines[fileno]
                try:
                    messages, is_over = line.receive(memory)
                    for message in messages:
                        said(line, message)
                except Exception:  # whoever said that hears no more; the others must not hear of it
                    traceback.print_exc()
                    is_over = True
                if is_over:
                    self._poll.unregister(fileno)
                    del self._lines[fileno]
                    line.close()
                    gone(line)

    def _accept(self) -> Line:
        line = Line(self._listening.accept()[0])
        self._lines[line.fileno] = line
        self._poll.register(line.fileno, select.EPOLLIN)
        return line
