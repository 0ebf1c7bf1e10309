"""Two hosts on this machine: network namespaces with a wire between them where these can be made, else two addresses of the loopback."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """`command` before another runs that one on this host; `address` is where the other one reaches it, through `interface`."""

    command: tuple[str, ...]
    address: str
    interface: str


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts for the block. Namespaces need root; without them processes are as far apart as two addresses of one machine are."""
    names = [f"tpt-{os.getpid()}-{number}" for number in (0, 1)]
    with ExitStack() as stack:
        if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, check=False).returncode:
            yield Host((), "127.0.0.1", "lo"), Host((), "127.0.0.2", "lo")
            return
        stack.callback(_ip, "netns", "delete", names[0])
        _ip("netns", "add", names[1])
        stack.callback(_ip, "netns", "delete", names[1])
        _ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire1", "netns", names[1])
        hosts = []
        for number, name in enumerate(names):
            address = f"10.201.77.{number + 1}"
            _ip("-n", name, "address", "add", f"{address}/24", "dev", f"wire{number}")
            for device in ("lo", f"wire{number}"):
                _ip("-n", name, "link", "set", device, "up")
            hosts.append(Host(("ip", "netns", "exec", name), address, f"wire{number}"))
        yield hosts[0], hosts[1]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
