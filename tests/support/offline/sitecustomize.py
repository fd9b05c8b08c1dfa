"""Loaded by every Python that has this folder on its path: says and refuses what leaves the machine.

A line goes to the file LLAMACONV_SOCKETS for each such interpreter ("python ID"), and for each name
or address that it asks for which is not the loopback's ("EVENT ADDRESS"). Whoever asked gets a
``PermissionError``; the line stays, however that is swallowed.
"""

import ipaddress
import os
import sys

_FILE = os.environ["LLAMACONV_SOCKETS"]
# Each event's argument that says where to. A bind says from where others may come.
_WHERE = {
    "socket.bind": 1,
    "socket.connect": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyaddr": 0,
    "socket.gethostbyname": 0,
    "socket.getnameinfo": 0,
    "socket.sendmsg": 1,
    "socket.sendto": 1,
}


def _note(line: str) -> None:
    # One write, so that the lines of several processes do not mix.
    file = os.open(_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def _stays(where: object) -> bool:
    """Whether an address is on this machine: the loopback's, a Unix socket's, or none."""
    if isinstance(where, tuple):
        where = where[0]  # (host, port, …); netlink's addresses are two numbers
    host = where.decode("latin-1") if isinstance(where, bytes) else where
    if not isinstance(host, str) or "/" in host or "\0" in host or host == "localhost":
        return True  # none, netlink's, the path of a Unix socket
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event in _WHERE and not _stays(arguments[_WHERE[event]]):
        _note(f"{event} {arguments[_WHERE[event]]}")
        raise PermissionError(f"{event} {arguments[_WHERE[event]]}: this test allows no network")


sys.addaudithook(_watch)
_note(f"python {os.getpid()}")
