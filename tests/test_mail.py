"""Messages of a GPU's process, whose other end is Python's own Connection, which frames them alike, or our Caller."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Connection
from queue import Queue

import numpy as np
import pytest

from barkstream.engines.mail import Caller, Line, Reader, ReadMemory


@pytest.fixture
def ends():
    """A line, and the connection at its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with Connection(theirs.detach()) as connection:
        line = Line(ours)
        yield line, connection
        line.close()


def all_of(line: Line, n: int) -> list[object]:
    """The next n messages, and no more than those."""
    memory, found = ReadMemory(), []
    while len(found) < n:
        messages, is_over = line.receive(memory)
        found += messages
        assert not is_over
    assert len(found) == n and line.receive(memory) == ([], False)
    return found


def test_messages_arrive_whole_and_in_order(ends):
    line, connection = ends
    said = [(1, "run", np.arange(5, dtype=np.int32)), b"", "x" * 100_000, None]
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: [connection.send(each) for each in said])
        heard = all_of(line, 4)
        sent.result()
    assert heard[0][2].tolist() == [0, 1, 2, 3, 4] and heard[1:] == said[1:]
    assert all(line.send(each) for each in said[1:])
    assert [connection.recv() for _ in said[1:]] == said[1:]


def test_a_message_may_come_byte_by_byte_and_with_a_long_length(ends):
    line, connection = ends
    data = pickle.dumps("slow")
    memory, found = ReadMemory(), []
    for byte in struct.pack("!iQ", -1, len(data)) + data:
        with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.send(bytes([byte]))
        found += line.receive(memory)[0]
    assert found == ["slow"]


def test_whoever_reads_late_holds_up_nobody_and_gets_everything(ends):
    line, connection = ends
    large = np.arange(2_000_000, dtype=np.int32)
    assert not line.send(large)
    assert all(line.send(i) for i in range(3))  # behind it, by whoever flushes
    flushing = threading.Thread(target=line.flush)
    flushing.start()
    assert np.array_equal(connection.recv(), large) and [connection.recv() for _ in range(3)] == [0, 1, 2]
    flushing.join(10)
    assert not flushing.is_alive() and line.send("more") and connection.recv() == "more"


def test_many_threads_send_whole_messages(ends):
    line, connection = ends
    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(lambda i=i: line.send([i] * 1000) or line.flush()) for i in range(200)]
        heard = [connection.recv() for _ in range(200)]
    assert sorted(each[0] for each in heard) == list(range(200)) and all(each == each[:1] * 1000 for each in heard)
    assert not any(each.exception() for each in sent)


def test_what_is_sent_to_somebody_who_has_gone_is_lost_and_no_error(ends):
    line, connection = ends
    assert not line.send(bytes(5_000_000))
    connection.close()
    line.flush()
    assert line.send("nobody hears this") and line.receive(ReadMemory())[1]
    line.close()
    assert line.send("nor this")


def test_a_reader_tells_who_comes_says_something_and_goes(tmp_path):
    path, told = tmp_path / "socket", Queue()
    reader = Reader(path)
    events = (
        lambda line: told.put(("joined", line)),
        lambda line, message: (told.put((message, line)), line.send(message * 2)),
        lambda line: told.put(("gone", line)),
    )
    threading.Thread(target=reader.read, args=events, daemon=True).start()
    with Client(str(path), "AF_UNIX") as one, Client(str(path), "AF_UNIX") as other:
        one.send("a")
        assert one.recv() == "aa"
        other.send("b")
        other.send("c")
        assert [other.recv(), other.recv()] == ["bb", "cc"]
    found = [told.get(timeout=10) for _ in range(7)]
    assert [what for what, _ in found if what in ("a", "b", "c")] == ["a", "b", "c"]
    assert {what for what, _ in found} == {"joined", "a", "b", "c", "gone"} and len({line for _, line in found}) == 2
    assert told.empty()


def test_a_line_that_says_what_nobody_understands_is_closed_and_the_others_are_not(tmp_path, capfd):
    path, gone = tmp_path / "socket", Queue()
    reader = Reader(path)
    events = (lambda line: None, lambda line, message: line.send(len(message)), gone.put)
    threading.Thread(target=reader.read, args=events, daemon=True).start()
    with (
        Client(str(path), "AF_UNIX") as good,
        Client(str(path), "AF_UNIX") as bad,
        Client(str(path), "AF_UNIX") as worse,
    ):
        bad.send(1)  # has no length
        worse.send_bytes(b"no pickle")
        for each in (bad, worse):
            with pytest.raises((EOFError, ConnectionError)):
                each.recv()
        good.send("abc")
        assert good.recv() == 3 and gone.qsize() == 2
    assert "has no len()" in capfd.readouterr().err


def test_a_caller_asks_and_hears_all_of_it_until_the_other_end_has_gone(tmp_path):
    reader, large = Reader(tmp_path / "s"), np.arange(500_000, dtype=np.int32)

    def answer(line, message):
        if message == "go":
            raise RuntimeError("which closes the line")
        for each in (message, large, "last"):
            if not line.send(each):
                threading.Thread(target=line.flush, daemon=True).start()

    arguments = (lambda line: None, answer, lambda line: None)
    threading.Thread(target=reader.read, args=arguments, daemon=True).start()
    caller = Caller(tmp_path / "s")
    for _ in range(2):
        caller.send(("ask", 1))
        assert caller.receive() == ("ask", 1) and np.array_equal(caller.receive(), large) and caller.receive() == "last"
    caller.send("go")
    with pytest.raises(EOFError, match="has ended"):
        caller.receive()


def test_a_caller_whom_nobody_listens_to_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        Caller(tmp_path / "nobody")
