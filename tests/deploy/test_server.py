from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from dysl_vla.deploy.client import Client
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.deploy.wire import pack, unpack
from dysl_vla.errors import ConfigError, RobotFault
from tests.deploy.serving import message, process, served
from tests.policies.test_dysl import make_dysl, observe


@pytest.fixture(scope="module")
def uri(bundle_folder: Path) -> Iterator[str]:
    with served(Bundle(bundle_folder)) as (_, address):
        yield address


def answers_alone(policy: Any, numbers: range) -> list[Any]:
    state = policy.reset()
    answers = []
    for number in numbers:
        [chunk] = policy.infer([observe(number)], [state])
        state.executed.extend(chunk.actions[: policy.spec.execute_steps])
        answers.append(chunk.actions)
    return answers


def test_openpis_client_and_ours_get_what_the_policy_answers(uri: str, bundle_folder: Path) -> None:
    expected = answers_alone(Bundle(bundle_folder), range(12))
    theirs = WebsocketClientPolicy(uri)
    assert theirs.get_server_metadata()["actions"]["shape"] == [4, 3]
    with Client(uri) as ours:
        assert ours.metadata["observation"]["observation.images.top"] == {"shape": [32, 32, 3], "dtype": "uint8"}
        for number, actions in enumerate(expected):
            np.testing.assert_array_equal(theirs.infer(message(number))["actions"], actions)
            answer = ours.infer(message(number))
            np.testing.assert_array_equal(answer["actions"], actions)
            assert answer["server_timing"]["infer_ms"] > 0
        ours.reset()
        np.testing.assert_array_equal(ours.infer(message(0))["actions"], expected[0])


def test_each_connection_is_an_episode_of_its_own(uri: str, bundle_folder: Path) -> None:
    def play(_: int) -> list[Any]:
        with Client(uri) as client:
            return [client.infer(message(number))["actions"] for number in range(12)]

    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(play, range(8)))
    expected = answers_alone(Bundle(bundle_folder), range(12))
    for run in runs:
        for mine, other in zip(run, expected, strict=True):
            np.testing.assert_array_equal(mine, other)


def test_requests_that_wait_are_batched_when_that_is_faster_and_answer_the_same() -> None:
    policy = make_dysl(skip=0.5)
    expected = answers_alone(policy, range(8))
    seen = []
    infer = policy.infer

    def spy(observations: Any, states: Any) -> Any:
        seen.append(len(observations))
        time.sleep(0.005)  # as a large model: rows are nearly free
        return infer(observations, states)

    policy.infer = spy  # type: ignore[method-assign]
    with served(policy) as (server, address):
        assert server.max_batch > 1
        seen.clear()

        def play(_: int) -> list[Any]:
            with Client(address) as client:
                return [client.infer(message(number))["actions"] for number in range(8)]

        with ThreadPoolExecutor(8) as pool:
            runs = list(pool.map(play, range(8)))
    assert max(seen) > 1
    for run in runs:
        for mine, other in zip(run, expected, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observation.state": np.zeros(3, np.float32)}, r"observation\.state: .*got float32 \(3,\)"),
        ({"observation.state": np.zeros((1, 2), np.float32)}, r"observation\.state: .*got float32 \(1, 2\)"),
        ({"observation.state": [0.0, 0.0]}, r"observation\.state: .*got list"),
        ({"observation.state": np.float32(1)}, r"observation\.state: .*got float32"),
        ({"observation.state": np.full(2, np.nan, np.float32)}, r"observation\.state: .*not finite"),
        ({"observation.state": np.full(2, 1e300)}, r"observation\.state: .*not finite"),
        ({"observation.state": None}, r"observation\.state is missing; the frame holds .*'observation\.images\.top'"),
        ({"observation.images.top": np.zeros((32, 32, 3), np.float32)}, r"observation\.images\.top: .*got float32"),
        ({"observation.images.top": np.zeros((3, 32, 32), np.uint8)}, r"observation\.images\.top: .*\(3, 32, 32\)"),
        ({"observation.images.top": np.zeros((0, 32, 3), np.uint8)}, r"observation\.images\.top: .*\(0, 32, 3\)"),
        ({"observation.images.top": "picture"}, r"observation\.images\.top: .*got str"),
        ({"observation.images.top": None}, r"observation\.images\.top is missing"),
        ({"prompt": None}, "prompt is missing; .*such as 'move the dot to the mark'"),
        ({"prompt": ""}, "prompt is blank, .*such as 'move the dot to the mark'"),
        ({"prompt": " \n\t\u3000"}, "prompt is blank, .*such as 'move the dot to the mark'"),
        ({"prompt": "x" * 2001}, "prompt must be .*at most 2000 characters, got 2001 characters"),
        ({"prompt": 7}, "prompt must be .*got int"),
        ({"reset": "yes"}, "reset must be true or false, got str"),
        ({"executed": np.zeros((2, 7), np.float32)}, r"executed must be .*\(at most 64, 3\), got float32 \(2, 7\)"),
        ({"executed": np.zeros((65, 3), np.float32)}, r"executed must be .*got float32 \(65, 3\)"),
        ({"executed": [[0.0, 0.0, 0.0]]}, "executed must be .*got list"),
        ({"executed": np.full((2, 3), np.inf, np.float32)}, "executed has a value that is not finite"),
        ({"executed": np.full((2, 3), 1e300)}, "executed has a value that is not finite"),
    ],
)
def test_a_bad_request_gets_an_error_and_the_next_one_an_answer(uri: str, changes: dict[str, Any], words: str) -> None:
    with Client(uri) as client:
        with pytest.raises(RobotFault, match=words):
            client.infer(message(0, **changes))
        assert client.infer(message(0))["actions"].shape == (4, 3)


FRAME = pack(message(0))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=20),
        st.lists(st.tuples(st.integers(0, len(FRAME) - 1), st.integers(0, 255)), min_size=1, max_size=4),
        st.integers(0, len(FRAME) - 1),
    )
)
def test_no_frame_ends_a_connection_or_goes_without_an_answer(uri: str, change: Any) -> None:
    frame: bytes | str
    if isinstance(change, list):
        data = bytearray(FRAME)
        for index, value in change:
            data[index] = value
        frame = bytes(data)
    else:
        frame = FRAME[:change] if isinstance(change, int) else change
    socket_ = _connection(uri)
    socket_.send(frame)
    answer = socket_.recv(timeout=5)
    assert isinstance(answer, str) or unpack(answer)["actions"].shape == (4, 3)


_open: dict[str, Any] = {}


def _connection(uri: str) -> Any:
    if uri not in _open:
        _open[uri] = connect(uri, compression=None)
        _open[uri].recv(timeout=5)
    return _open[uri]


def test_an_image_that_is_too_large_is_named_and_the_connection_stays_open(uri: str) -> None:
    too_large = message(0, **{"observation.images.top": np.zeros((1080, 1920, 3), np.uint8)})
    words = r"observation\.images\.top: expected uint8 \(32, 32, 3\), got uint8 \(1080, 1920, 3\)"
    theirs = WebsocketClientPolicy(uri)
    with Client(uri) as ours:
        for client, error in ((ours, RobotFault), (theirs, RuntimeError)):
            for number in range(2):
                with pytest.raises(error, match=words):
                    client.infer(too_large)
                assert client.infer(message(number))["actions"].shape == (4, 3)


def test_a_frame_beyond_all_measure_ends_its_own_connection_alone(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dysl_vla.deploy.server.LARGEST_FRAME", 1_000_000)
    with served(Bundle(bundle_folder)) as (_, address), Client(address) as other:
        with connect(address, compression=None) as huge:
            huge.recv(timeout=5)
            huge.send(b"\0" * 3_000_000)
            with pytest.raises(ConnectionClosed, match=r"1009.*limit of 1000000 bytes"):
                huge.recv(timeout=5)
        assert other.infer(message(0))["actions"].shape == (4, 3)
    assert "limit of 1000000 bytes" in caplog.text


def test_four_times_what_is_expected_is_always_read(monkeypatch: pytest.MonkeyPatch, bundle_folder: Path) -> None:
    monkeypatch.setattr("dysl_vla.deploy.server.LARGEST_FRAME", 1)
    with served(Bundle(bundle_folder)) as (_, address), Client(address) as client:
        assert client.metadata["max_frame_bytes"] == 4 * 3 * (32 * 32 + 16 * 16)
        assert client.infer(message(0))["actions"].shape == (4, 3)


def deafen(uri: str) -> Any:
    """A connection whose side never reads, with little room for answers."""
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.connect(("127.0.0.1", int(uri.rpartition(":")[2])))
    return connect(uri, sock=small, compression=None, max_queue=1, close_timeout=0.1)


def test_a_client_that_never_reads_delays_nobody_and_is_disconnected(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dysl_vla.deploy.server.SEND_S", 0.5)
    bad = pack({"prompt": "x" * 3000})  # refused with a text, which fills buffers as well
    with served(Bundle(bundle_folder)) as (server, address):
        deaf = deafen(address)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(lambda: [deaf.send(bad) for _ in range(10**6)])
            with Client(address) as client:
                times = []
                for number in range(30):
                    started = time.perf_counter()
                    client.infer(message(number))
                    times.append(time.perf_counter() - started)
            assert np.median(times) < 0.5
            assert asking.exception(30) is not None  # the server disconnected it
        assert not server._connections


def test_the_server_ends_although_a_client_is_deaf(bundle_folder: Path) -> None:
    with process(bundle_folder) as (server, address):
        deaf = deafen(address)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(lambda: [deaf.send(FRAME) for _ in range(10**6)])
            time.sleep(1)
            server.send_signal(signal.SIGTERM)
            assert server.wait(5) == 0
            assert asking.exception(10) is not None


@pytest.mark.slow
def test_ten_thousand_frames_touch_no_other_connection_and_leave_no_memory(bundle_folder: Path) -> None:
    rng = np.random.default_rng(0)
    with process(bundle_folder) as (server, address), Client(address) as other:
        resident = psutil.Process(server.pid).memory_info
        bad = connect(address, compression=None)
        bad.recv(timeout=5)
        for number in range(10_000):
            data = bytearray(FRAME)
            kind = number % 4
            if kind == 0:
                data = bytearray(rng.bytes(int(rng.integers(0, 200))))
            elif kind == 1:
                del data[int(rng.integers(0, len(data))) :]
            else:
                for index in rng.integers(0, len(data) if kind == 2 else 300, 3):
                    data[index] = int(rng.integers(0, 256))
            bad.send(bytes(data))
            answer = bad.recv(timeout=5)
            assert isinstance(answer, str) or unpack(answer)["actions"].shape == (4, 3)
            if number == 2000:
                first = resident().rss
            if number % 500 == 0:
                assert other.infer(message(number))["actions"].shape == (4, 3)
        assert resident().rss - first < 5e6


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address.replace("ws://", "http://"), timeout=5) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_and_metrics_are_plain_http(uri: str) -> None:
    with Client(uri) as client:
        client.infer(message(0))
        assert get(f"{uri}/healthz") == (200, "OK\n")
        status, text = get(f"{uri}/metrics")
    assert status == 200
    assert 'dysl_requests_total{outcome="ok"}' in text
    assert "dysl_request_seconds_bucket" in text


def test_a_key_is_asked_for_before_anything_else(bundle_folder: Path) -> None:
    with served(Bundle(bundle_folder), "secret") as (_, address):
        for key in (None, "wrong", "secre", "Secret"):
            with pytest.raises(ConfigError, match="API key"):
                Client(address, api_key=key)
        with Client(address, api_key="secret") as client:
            assert client.infer(message(0))["actions"].shape == (4, 3)
        assert WebsocketClientPolicy(address, api_key="secret").infer(message(0))["actions"].shape == (4, 3)
        assert get(f"{address}/healthz")[0] == 200


def test_ending_answers_what_runs_and_refuses_what_comes(bundle_folder: Path) -> None:
    policy = Bundle(bundle_folder)
    infer = policy.infer
    begun = threading.Event()

    def slowly(observations: Any, states: Any) -> Any:
        begun.set()
        time.sleep(0.5)
        return infer(observations, states)

    with ThreadPoolExecutor(1) as pool:
        with served(policy) as (_, address):
            client, late = Client(address), Client(address)
            policy.infer = slowly  # type: ignore[method-assign]
            running = pool.submit(client.infer, message(0))
            assert begun.wait(5)
        assert running.result(5)["actions"].shape == (4, 3)
        with pytest.raises(RobotFault):
            late.infer(message(1))
        with pytest.raises((RobotFault, ConfigError)):
            Client(address)


def test_sigterm_exits_0(bundle_folder: Path) -> None:
    with process(bundle_folder) as (server, address), Client(address) as client:
        assert client.infer(message(0))["actions"].shape == (4, 3)
        server.send_signal(signal.SIGTERM)
        assert server.wait(5) == 0
        with pytest.raises(RobotFault):
            client.infer(message(1))


def test_a_client_that_gave_up_gets_no_answer_to_another_question(bundle_folder: Path) -> None:
    policy = Bundle(bundle_folder)
    with served(policy) as (_, address), Client(address, timeout_s=0.2) as client:
        infer = policy.infer
        policy.infer = lambda o, s: (time.sleep(0.5), infer(o, s))[1]  # type: ignore[method-assign,func-returns-value]
        with pytest.raises(RobotFault, match="no answer"):
            client.infer(message(0))
        with pytest.raises(RobotFault, match="connect"):
            client.infer(message(1))


def test_one_robots_failure_is_not_its_neighbours() -> None:
    policy = make_dysl(skip=0.5)
    infer = policy.infer

    def fussy(observations: Any, states: Any) -> Any:
        time.sleep(0.005)
        if any(observation["task"] == "fail" for observation in observations):
            raise ValueError("bug")
        return infer(observations, states)

    policy.infer = fussy  # type: ignore[method-assign]
    with served(policy) as (_, address):

        def play(number: int) -> int:
            with Client(address) as client:
                failures = 0
                for step in range(6):
                    try:
                        client.infer(message(step, prompt="fail" if number == 0 else "go"))
                    except RobotFault:
                        failures += 1
                return failures

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(play, range(6))) == [6, 0, 0, 0, 0, 0]


def test_a_killed_client_touches_nobody(bundle_folder: Path) -> None:
    with process(bundle_folder) as (_, address), Client(address) as client:
        script = (
            "from dysl_vla.deploy.client import Client; from tests.deploy.serving import message\n"
            f"client = Client({address!r})\n"
            "print('ready', flush=True)\n"
            "while True: client.infer(message(0))"
        )
        victim = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        for number in range(30):
            if number == 10:
                os.kill(victim.pid, signal.SIGKILL)
                victim.wait()
            assert client.infer(message(number))["actions"].shape == (4, 3)
