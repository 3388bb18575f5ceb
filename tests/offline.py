"""No test uses the network, and none can by accident: what refuses it, and a note of who tried."""

from __future__ import annotations

import socket
from typing import Any

ATTEMPTS: list[str] = []


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: OSError for a connection to another machine."""
    if event != "socket.connect":
        return
    connection, address = arguments
    # A datagram socket sends nothing when it connects: that is how a program finds its own address.
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type == socket.SOCK_DGRAM:
        return
    if str(address[0]) not in _own_addresses():
        ATTEMPTS.append(f"{address[0]}:{address[1]}")
        raise OSError(f"a test may not connect to {address[0]}")


def _own_addresses() -> set[str]:
    try:
        return {"127.0.0.1", "::1", "localhost", *socket.gethostbyname_ex(socket.gethostname())[2]}
    except OSError:
        return {"127.0.0.1", "::1", "localhost"}
