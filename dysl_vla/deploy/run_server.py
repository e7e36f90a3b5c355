"""`dysl serve`: takes an address, loads a policy, and serves it until the process is asked to end."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import dataclass, field
from pathlib import Path

from dysl_vla.deploy.robot import open_policy
from dysl_vla.deploy.server import PolicyServer
from dysl_vla.errors import ConfigError
from dysl_vla.policies.compute import ComputeConfig

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeConfig:
    """Serve a policy to openpi clients over websockets."""

    bundle: Path | None = None
    """Folder of `dysl export`."""
    policy: str | None = None
    """Instead of a bundle: a shipped name, a checkpoint's folder or a hub id, run by PyTorch."""
    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own needs a key."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key_file: Path | None = None
    """File with the key that clients must send; nobody else should be able to read it."""
    skip: float | None = None
    """How much to skip, from 0, the full model, to 1; None: the stored operating point."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be 0-65535, got {self.port}.")
        if self.host not in LOOPBACK and self.api_key_file is None:
            raise ConfigError(f"host {self.host} can be reached from other machines; give an --api-key-file.")


def serve_policy(config: ServeConfig) -> None:
    """Load, and serve until SIGTERM or SIGINT.

    Raises:
        DyslError: The policy cannot be loaded, the key cannot be read, or the address cannot be listened on.
    """
    key = _read_key(config.api_key_file)
    with bind(config.host, config.port) as address:
        policy = open_policy(config.bundle, config.policy, config.skip, config.compute)
        try:
            asyncio.run(PolicyServer(policy, key).run(address))
        except OSError as error:  # another server, bound like this one, has been listening since
            if error.errno != errno.EADDRINUSE:
                raise
            raise _cannot_listen(config.host, config.port, error) from error


def bind(host: str, port: int) -> socket.socket:
    """Take an address, on which nobody is answered yet.

    Args:
        host: A name or number of this machine's.
        port: Port to listen on; 0: any free one.

    Raises:
        ConfigError: The address cannot be taken; the message says what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host {host} is unknown ({error}); give an address of this machine.") from error
    # "localhost" may be two addresses: the IPv4 one is what clients try first or last, but always.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    fix = {
        errno.EADDRINUSE: "end the program that listens there, or give another --port",
        errno.EADDRNOTAVAIL: "give a --host that is an address of this machine",
        errno.EACCES: "give a --port from 1024 on, those below are the system's",
    }.get(error.errno or 0, "give another --host or --port")
    return ConfigError(f"The server cannot listen on {host}:{port} ({error.strerror}); {fix}.")


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read ({error}); give a file with the key in it.") from error
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"api_key_file {path} must hold one line of printable ASCII, the key.")
    return key
