"""What the client does with servers, and with what only looks like one."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dysl_vla.deploy.client import Client
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.deploy.wire import pack, unpack
from dysl_vla.errors import ConfigError, ObservationError, RobotFault
from tests.deploy.peers import (
    LARGE,
    Behaviour,
    answering,
    answers_in_endless_pieces,
    answers_nothing,
    answers_slowly,
    check_becomes,
    check_is_over,
    forever,
    frame,
    greet,
    greets_slowly,
    handshake,
    peer,
    pings_and_reads_nothing,
    reads_nothing,
    reads_slowly,
    says_nothing_first,
    shakes_hands_slowly,
    soon,
    takes_no_goodbye,
)
from tests.deploy.serving import message, process, served


@pytest.mark.parametrize("behave", [forever, says_nothing_first, shakes_hands_slowly, greets_slowly])
@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_connecting_takes_no_longer_than_it_may(behave: Behaviour, scheme: str) -> None:
    with peer(behave) as uri, soon(), pytest.raises((RobotFault, ConfigError)) as caught:
        Client(uri.replace("ws", scheme), timeout_s=0.3)
    if scheme == "ws":
        assert "no answer within 0.3 s" in str(caught.value) or "timed out" in str(caught.value)


def test_a_name_that_is_looked_up_for_ever_does_not_hold_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_over.wait(60) and [])
    with soon(), pytest.raises(RobotFault, match="no answer within"):
        Client("ws://robot.example:8000", timeout_s=0.2)
    is_over.set()


@pytest.mark.parametrize(
    "behave",
    [
        reads_nothing,
        reads_slowly,
        answers_nothing,
        answers_slowly,
        answers_in_endless_pieces,
        pings_and_reads_nothing,
        takes_no_goodbye,
    ],
)
@pytest.mark.parametrize("extra", [{}, LARGE])
def test_asking_takes_no_longer_than_it_may_and_then_the_connection_is_over(
    behave: Behaviour, extra: dict[str, Any]
) -> None:
    with peer(behave) as uri, Client(uri, timeout_s=0.3) as client:
        with soon(), pytest.raises(RobotFault, match="connect again"):
            client.infer(message(0, **extra))
        check_is_over(client)


@pytest.mark.parametrize("extra", [{}, LARGE])
def test_a_stopped_server_is_given_up_in_time(bundle_folder: Path, extra: dict[str, Any]) -> None:
    with process(bundle_folder) as (server, uri), Client(uri, timeout_s=0.5) as client, Client(uri) as idle:
        assert client.infer(message(0))["actions"].shape == (4, 3)
        server.send_signal(signal.SIGSTOP)
        with soon(), pytest.raises(RobotFault, match=r"no answer within 0\.5 s; connect again"):
            client.infer(message(1, **extra))
        check_is_over(client)
        with soon():
            idle.close()
        with soon(), pytest.raises(RobotFault, match=r"0\.2 s"):
            Client(uri, timeout_s=0.2)
        server.send_signal(signal.SIGCONT)
        with Client(uri) as again:
            assert again.infer(message(0))["actions"].shape == (4, 3)


def test_leaving_is_quick_and_hides_no_error(bundle_folder: Path) -> None:
    def fail_beside_a_stopped_server() -> None:
        with Client(uri):
            server.send_signal(signal.SIGSTOP)
            raise ZeroDivisionError

    with process(bundle_folder) as (server, uri), soon(), pytest.raises(ZeroDivisionError):
        fail_beside_a_stopped_server()


def test_a_server_that_is_killed_amid_an_answer_is_reported_at_once(bundle_folder: Path) -> None:
    with process(bundle_folder) as (server, uri), Client(uri, timeout_s=60) as client, ThreadPoolExecutor(1) as pool:
        server.send_signal(signal.SIGSTOP)
        asking = pool.submit(client.infer, message(0))
        time.sleep(0.2)
        with soon():
            server.kill()
            with pytest.raises(RobotFault, match=r"closed the connection .*connect again"):
                asking.result()
        check_is_over(client)
        with soon(), pytest.raises(RobotFault, match="does not answer"):
            Client(uri)


def test_a_server_that_restarted_between_two_questions_needs_a_new_client(bundle_folder: Path) -> None:
    with served(Bundle(bundle_folder)) as (_, uri):
        client = Client(uri)
        client.infer(message(0))
    with served(Bundle(bundle_folder), port=int(uri.rpartition(":")[2])):
        with soon(), pytest.raises(RobotFault, match="connect again"):
            client.infer(message(1))
        check_is_over(client)
        with Client(uri) as again:
            assert again.infer(message(1))["actions"].shape == (4, 3)


def test_after_closing_nothing_is_asked(bundle_folder: Path) -> None:
    with served(Bundle(bundle_folder)) as (_, uri):
        with Client(uri) as client:
            client.infer(message(0))
        with pytest.raises(RobotFault, match="it was closed"):
            client.infer(message(1))
        check_is_over(client)


def test_what_is_interrupted_is_not_taken_for_the_answer_to_the_next_question() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with peer(answers_slowly) as uri, Client(uri) as client:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with soon(), pytest.raises(KeyboardInterrupt):
                client.infer(message(0))
            check_is_over(client)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_threads_that_share_a_client_get_their_own_answers() -> None:
    def echo(connection: socket.socket) -> None:
        greet(connection)
        while True:
            size = connection.recv(2, socket.MSG_WAITALL)[1] & 127
            mask, data = connection.recv(4, socket.MSG_WAITALL), connection.recv(size, socket.MSG_WAITALL)
            asked = unpack(bytes(byte ^ mask[index % 4] for index, byte in enumerate(data)))
            resets.append("reset" in asked)
            time.sleep(0.001)
            connection.sendall(frame(pack({"actions": np.array([[asked["number"]]])})))

    resets: list[bool] = []
    with peer(echo) as uri, Client(uri) as client, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda number: client.infer({"number": number})["actions"].item(), range(200))
        assert list(answers) == list(range(200))
    assert resets.count(True) == 1


def test_a_reset_during_a_request_is_for_the_next_one_and_one_that_failed_is_kept() -> None:
    def serve(connection: socket.socket) -> None:
        greet(connection)
        while size := connection.recv(2, socket.MSG_WAITALL)[1] & 127:
            mask, data = connection.recv(4, socket.MSG_WAITALL), connection.recv(size, socket.MSG_WAITALL)
            asked = unpack(bytes(byte ^ mask[index % 4] for index, byte in enumerate(data)))
            resets.append("reset" in asked)
            if asked["number"] == 1:
                client.reset()
            actions = np.array([[np.nan if asked["number"] == 0 else 1.0]])
            connection.sendall(frame(pack({"actions": actions})))

    resets: list[bool] = []
    with peer(serve) as uri:
        client = Client(uri)
        with client:
            with pytest.raises(RobotFault, match="not finite"):
                client.infer({"number": 0})
            with pytest.raises(ObservationError):
                client.infer({"number": object()})
            for number in (1, 2, 3):
                client.infer({"number": number})
    assert resets == [True, True, True, False]


def test_a_thread_that_waited_in_vain_for_its_turn_does_not_end_the_connection(bundle_folder: Path) -> None:
    policy = Bundle(bundle_folder)
    with served(policy) as (_, uri), Client(uri, timeout_s=2.0) as client, ThreadPoolExecutor(1) as pool:
        infer = policy.infer
        policy.infer = lambda o, s: (time.sleep(1.0), infer(o, s))[1]  # type: ignore[method-assign,func-returns-value]
        asking = pool.submit(client.infer, message(0))
        time.sleep(0.2)
        client._timeout_s = 0.2
        with pytest.raises(RobotFault, match="Another thread"):
            client.infer(message(1))
        assert asking.result()["actions"].shape == (4, 3)
        client._timeout_s = 10.0
        assert client.infer(message(1))["actions"].shape == (4, 3)


def test_closing_ends_what_another_thread_waits_for() -> None:
    with peer(answers_nothing) as uri, Client(uri, timeout_s=60) as client, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client.infer, message(0, **LARGE))
        time.sleep(0.2)
        with soon():
            client.close()
            with pytest.raises(RobotFault, match="it was closed"):
                asking.result()


def test_a_question_that_comes_while_another_thread_closes_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Client._packed
    monkeypatch.setattr(Client, "_packed", lambda client, asked: (client.close(), packed(client, asked))[1])
    with peer(answers_nothing) as uri, Client(uri, timeout_s=60) as client:
        with soon(), pytest.raises(RobotFault, match="it was closed"):
            client.infer(message(0))
        check_is_over(client)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_limit_that_is_none_is_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="timeout_s must be"):
        Client("ws://127.0.0.1:1", timeout_s=timeout_s)


@pytest.mark.parametrize("value", [object(), np.array(["x"]), {"a": [1, object()]}, 1 << 70, "\ud800", 1j])
def test_what_cannot_be_sent_is_named_and_nothing_is_sent(bundle_folder: Path, value: Any) -> None:
    with served(Bundle(bundle_folder)) as (_, uri), Client(uri) as client:
        with pytest.raises(ObservationError, match=r"observation\.state cannot be sent"):
            client.infer(message(0, **{"observation.state": value}))
        assert client.infer(message(0))["actions"].shape == (4, 3)


def test_a_frame_that_would_end_the_connection_is_not_sent(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dysl_vla.deploy.server.LARGEST_FRAME", 1_000_000)
    with served(Bundle(bundle_folder)) as (_, uri), Client(uri) as client:
        assert client.metadata["max_frame_bytes"] == 1_000_000
        huge = np.zeros((1080, 1920, 3), np.uint8)
        with pytest.raises(ObservationError, match=r"at most 1000000; .*observation.images.top \(1080, 1920, 3\)"):
            client.infer(message(0, **{"observation.images.top": huge}))
        assert client.infer(message(0))["actions"].shape == (4, 3)


@pytest.mark.parametrize(
    ("answer", "words", "is_over"),
    [
        (frame(pack({})), "no array of actions", False),
        (frame(pack({"actions": [1.0]})), "no array of actions", False),
        (frame(pack({"actions": np.full((4, 3), np.nan)})), "not finite", False),
        (frame(b"Traceback: bug", 1), "with an error: Traceback: bug", False),
        (frame(b"\xc1\xc1"), "no openpi frame", True),
        (frame(b"\x91\x01"), "no openpi frame", True),
        (frame(b"\xff\xfe", 1), "closed the connection", True),
        (frame(pack({"actions": np.zeros(1)}))[:-2], "closed the connection", True),
        (b"\x8f\xff\xff\xff", "closed the connection", True),
    ],
)
def test_an_answer_that_is_none_is_a_fault_of_the_server(answer: bytes, words: str, is_over: bool) -> None:
    good = frame(pack({"actions": np.zeros((4, 3))}))
    with peer(answering(answer) if is_over else answering(answer, good)) as uri, Client(uri) as client:
        with pytest.raises(RobotFault, match=words):
            client.infer({})
        if is_over:
            check_is_over(client)
        else:
            assert client.infer({})["actions"].shape == (4, 3)


@pytest.mark.parametrize("first", [frame(b"go away", 1), frame(b"\xc1"), frame(b"\x01"), b"\x88\x02\x03\xe8"])
def test_a_server_that_does_not_say_what_it_expects_is_not_connected_to(first: bytes) -> None:
    def behave(connection: socket.socket) -> None:
        connection.sendall(handshake(connection) + first)
        forever(connection)

    threads = threading.active_count()
    with peer(behave) as uri, soon():
        with pytest.raises(RobotFault):
            Client(uri, timeout_s=1.0)
        check_becomes(lambda: threading.active_count() <= threads + 2)  # the peer's own two


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=30), st.sampled_from([b"", b"\x81\x05", b"\x82\x05", b"\x82\x7f", b"\x88\x02", b"\x01\x02"]))
def test_whatever_bytes_come_end_in_an_answer_or_a_fault(data: bytes, head: bytes) -> None:
    with peer(answering(head + data)) as uri, Client(uri) as client, soon():
        for _ in range(3):
            with suppress(RobotFault):
                client.infer({})


def test_a_server_that_thinks_for_long_is_waited_for() -> None:
    """It is waited for even beyond the time in which other clients miss the answer to a ping."""
    with peer(answers_nothing) as uri, Client(uri, timeout_s=60) as client:
        assert client._connection is not None
        assert client._connection.ping_interval is None


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux alone lists a process's files there")
def test_clients_that_failed_leave_no_socket_and_no_thread() -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208

    files, threads = count()
    with peer(reads_nothing) as uri:
        for client in [Client(uri, timeout_s=0.5) for _ in range(5)]:
            with pytest.raises(RobotFault):
                client.infer(message(0, **LARGE))
        check_becomes(lambda: count()[1] <= threads + 1 + 5)  # the peer's own
    check_becomes(lambda: count()[0] <= files)
