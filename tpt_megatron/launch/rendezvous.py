"""Where nodes find each other: a store that node 0 holds until all of them have ended.

torchrun's own store goes with the first agent that ends. Then the others would end with a lost connection rather than with what their ranks ended with.
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from tpt_megatron.errors import MachineError, UsageError

JOIN_S = 900
"""How long nodes wait for each other: images are pulled and disks mounted meanwhile."""
GOODBYE_S = 30
"""How long node 0 waits for the others to end as it did. One that was killed does not tell."""
TRY_S = 5


class Rendezvous:
    """The store of a job, for a `with` block around torchrun's agent, which finds it there by its address. Of a single node: nothing."""

    def __init__(self, address: str | None, node: int, nodes: int, name: str) -> None:
        self._address, self._node, self._nodes = address or "", node, nodes
        self._name = f"tpt/{name}"
        self._store: Any = None
        self.linger = False
        """Whether node 0 waits for the others: set where their ranks end well, too, and their agents should hear of it."""

    def __enter__(self) -> Rendezvous:
        if self._nodes > 1:
            self._store = self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is None:
            return
        from torch.distributed import DistError

        with suppress(DistError):  # node 0 is gone, or another one does not say goodbye
            self._store.set(f"{self._name}/ended/{self._node}", "")
            if self._node == 0:
                self._store.set(f"{self._name}/ending", "")
                if self.linger:
                    self._store.wait([f"{self._name}/ended/{node}" for node in range(self._nodes)], timedelta(seconds=GOODBYE_S))

    def _connect(self) -> Any:
        """Return the store: node 0 makes it, the others try until it is there. In tries that are short, since a signal waits for the end of one."""
        from torch._C._distributed_c10d import TCPStore
        from torch.distributed import DistError

        host, _, port = self._address.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"rendezvous={self._address}: expected HOST:PORT")
        deadline = time.monotonic() + JOIN_S
        while True:
            try:
                # The same process and port: torchrun's agent on node 0 shares this server.
                store = TCPStore(host, int(port), is_master=self._node == 0, multi_tenant=True, wait_for_workers=False, timeout=timedelta(seconds=TRY_S))
                if self._node == 0 or not store.check([f"{self._name}/ending"]):
                    return store
                del store  # of an attempt that is over; the next one's comes
            except DistError as error:
                if self._node == 0 or time.monotonic() > deadline:
                    what = "cannot be opened here" if self._node == 0 else f"node 0 was not reached within {JOIN_S} s"
                    raise MachineError(f"rendezvous={self._address}: {what} ({str(error).splitlines()[0]})") from None
            time.sleep(1)
