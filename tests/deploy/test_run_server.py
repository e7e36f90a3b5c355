"""What `dysl serve` refuses before it serves."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from dysl_vla.deploy.robot import open_policy
from dysl_vla.deploy.run_server import ServeConfig, bind, serve_policy
from dysl_vla.errors import ConfigError


def test_other_machines_need_a_key() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::"):  # noqa: S104
        with pytest.raises(ConfigError, match="api-key-file"):
            ServeConfig(Path("b"), host=host)
    for port in (-1, 70000):
        with pytest.raises(ConfigError, match=f"port must be 0-65535, got {port}"):
            ServeConfig(Path("b"), port=port)


def test_a_taken_port_is_named(bundle_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*--port"):
            serve_policy(ServeConfig(bundle_folder, port=port))


def test_an_address_that_another_server_took_while_this_one_loaded_is_named(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]

        def load(*what: Any) -> Any:
            taken.listen()
            return open_policy(*what)

        monkeypatch.setattr("dysl_vla.deploy.run_server.open_policy", load)
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*--port"):
            serve_policy(ServeConfig(bundle_folder, port=port))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("nobody.invalid", r"host nobody\.invalid is unknown"),
        ("a..b", r"host a\.\.b is unknown"),
        ("192.0.2.1", r"192\.0\.2\.1.*an address of this machine"),
    ],
)
def test_an_address_that_is_not_ours_is_refused_before_the_policy_is_loaded(
    tmp_path: Path, host: str, message: str
) -> None:
    (tmp_path / "key").write_text("secret")
    with pytest.raises(ConfigError, match=message):
        serve_policy(ServeConfig(tmp_path / "no-bundle", host=host, api_key_file=tmp_path / "key"))
