"""What the client says of addresses at which no policy server is, of proxies, and of TLS."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from dysl_vla.deploy.client import Client
from dysl_vla.deploy.runtime import Bundle
from dysl_vla.errors import ConfigError, RobotFault
from tests.deploy.peers import (
    LARGE,
    Behaviour,
    check_is_over,
    peer,
    reads_nothing,
    soon,
)
from tests.deploy.serving import message, served


@pytest.mark.parametrize(
    ("uri", "error", "words"),
    [
        ("localhost:8000", ConfigError, "uri must be like ws://"),
        ("http://localhost:8000", ConfigError, "uri must be like ws://"),
        ("ws://", ConfigError, "uri must be like ws://"),
        ("", ConfigError, "uri must be like ws://"),
        ("ws://localhost:99999", ConfigError, "uri must be like ws://"),
        ("ws://localhost:http", ConfigError, "uri must be like ws://"),
        ("ws://::1:8000", ConfigError, "uri must be like ws://"),
        ("ws://[::1:8000", ConfigError, "uri must be like ws://"),
        ("ws://a..b:8000", ConfigError, "uri must be like ws://"),
        ("ws://nobody.invalid:8000", RobotFault, "does not answer"),
        ("ws://127.0.0.1:1", RobotFault, "does not answer"),
    ],
)
def test_an_address_at_which_no_server_can_be_is_named(uri: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        Client(uri)
    assert uri in str(caught.value)


def test_what_is_no_policy_server_is_not_taken_for_one() -> None:
    def http(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    def shell(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        connection.recv(100)
        connection.shutdown(socket.SHUT_RDWR)

    def leaves(connection: socket.socket) -> None:
        connection.recv(100)
        connection.shutdown(socket.SHUT_RDWR)

    with peer(http) as uri, pytest.raises(ConfigError, match="not by a policy server"):
        Client(uri)
    with peer(leaves) as uri, pytest.raises(RobotFault, match="does not answer"):
        Client(uri)
    with peer(shell) as uri, pytest.raises((ConfigError, RobotFault), match=r"not by a policy server|does not answer"):
        Client(uri)


def test_a_proxy_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    with peer(refuse) as uri:
        monkeypatch.setenv("http_proxy", uri.replace("ws", "http"))
        with pytest.raises(ConfigError, match="no_proxy"):
            Client("ws://robot.example:8000")
        monkeypatch.setenv("http_proxy", "socks5h://127.0.0.1:1")
        with pytest.raises((ConfigError, RobotFault)):
            Client("ws://robot.example:8000")


def test_a_server_of_ipv6_answers(bundle_folder: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with served(Bundle(bundle_folder), host="::1") as (server, uri), Client(uri) as client:
        assert uri == f"ws://[::1]:{server.port}"
        assert client.infer(message(0))["actions"].shape == (4, 3)


def test_tls_where_none_is_spoken_is_named(bundle_folder: Path) -> None:
    with served(Bundle(bundle_folder)) as (_, uri), pytest.raises(ConfigError, match="dysl serve itself speaks ws://"):
        Client(uri.replace("ws", "wss"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes a certificate, is not installed")
def test_tls_is_limited_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def behind_tls(behave: Behaviour) -> Behaviour:
        return lambda connection: behave(context.wrap_socket(connection, server_side=True))

    with peer(behind_tls(reads_nothing)) as plain:
        uri = plain.replace("ws", "wss")
        with pytest.raises(ConfigError, match="certificate"):
            Client(uri)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with Client(uri, timeout_s=1.0) as client:
            with soon(), pytest.raises(RobotFault, match="no answer within 1 s"):
                client.infer(message(0, **LARGE))
            check_is_over(client)
        with soon(), Client(uri):
            pass


def test_a_key_is_refused_in_words_that_say_what_is_wrong_with_it(bundle_folder: Path) -> None:
    with served(Bundle(bundle_folder), "secret") as (_, uri):
        with pytest.raises(ConfigError, match="wants an API key"):
            Client(uri)
        with pytest.raises(ConfigError, match="refuses this API key"):
            Client(uri, api_key="wrong")
        for key in ("secret\n", "a\r\nX-Evil: b", "schlüssel"):
            with pytest.raises(ConfigError, match="api_key must be printable ASCII"):
                Client(uri, api_key=key)
