"""Who is still there: every rank holds one TCP connection to rank 0, and its end without a goodbye is a death.

The kernel closes a dead process's connections, whatever that process or its peers were waiting in: no heartbeats,
and nothing that a busy interpreter could delay on the side of the dead. A machine that is gone closes nothing;
there the kernel's unanswered probes end the connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from imdm_scale.errors import UserError

PORT_KEY = "imdm_scale/liveness_port"
CONNECT_SECONDS = 30.0
"""How long rank 0 waits for the next rank, and a rank for rank 0. All have just met: it takes milliseconds."""
PROBE_SECONDS = 3
"""A silent connection is probed so often."""
SILENCE_SECONDS = 10
"""A machine that has left probes or messages unanswered for so long is gone."""
PRESENT, GONE, FAILED = "present", "gone", "failed"
"""States of a rank: taking part; ended in good order; ending all because a rank has said why it cannot go on."""


@dataclass
class Peer:
    """The rank at the other end of a connection, as far as it has said."""

    connection: socket.socket
    rank: int = 0
    host: str = ""
    label: str = ""
    """What the rank does in this run, in words."""
    state: str = PRESENT
    unread: bytes = b""
    """The beginning of a message whose rest is under way."""

    def __post_init__(self) -> None:
        self.connection.settimeout(CONNECT_SECONDS)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_SECONDS)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_SECONDS)

    def tell(self, **fields: int | str) -> None:
        """Tell the peer what is new of this rank's fields. That it is gone is for the watching thread to see."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(fields).encode() + b"\n")

    def listen(self) -> None:
        """Take in what the peer tells; waits for something.

        Raises:
            OSError: the peer is gone.
        """
        received = self.connection.recv(4096)
        if not received:
            raise ConnectionResetError("the connection was closed")
        *messages, self.unread = (self.unread + received).split(b"\n")
        for message in messages:
            vars(self).update(json.loads(message))

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}" + (f" ({self.label})" if self.label else "")


class Liveness:
    """A thread that watches over other ranks: on rank 0 over all, on every other rank over rank 0.

    Args:
        rank, world_size: this process's place.
        on_loss: ends the process, called by the thread with a rank that has gone without a goodbye.
        on_failure: ends the process, called by the thread when a rank has announced a failure.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        on_loss: Callable[[Peer], NoReturn],
        on_failure: Callable[[], NoReturn],
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.on_loss = on_loss
        self.on_failure = on_failure
        self.host = socket.gethostname()
        self.peers: list[Peer] = []
        self.thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def start(self, store: dist.Store, rank_0_address: str) -> None:
        """Connect all ranks, each of which calls this, and begin to watch.

        Args:
            store: tells the others at which port rank 0 listens while they connect.
            rank_0_address: the machine of rank 0.

        Raises:
            UserError: a rank and rank 0 cannot reach each other.
        """
        # A forked child would hold the connections open beyond the death of its parent.
        os.register_at_fork(after_in_child=self._close)
        if self.rank == 0:
            self._accept(store)
        else:
            self._connect(rank_0_address, int(store.get(PORT_KEY)))
        self.thread.start()

    def _accept(self, store: dist.Store) -> None:
        has_ipv6 = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if has_ipv6 else socket.AF_INET
        with socket.create_server(
            ("", 0), family=family, backlog=self.world_size, dualstack_ipv6=has_ipv6
        ) as server:
            server.settimeout(CONNECT_SECONDS)
            port = server.getsockname()[1]
            store.set(PORT_KEY, str(port))
            try:
                while len(self.peers) < self.world_size - 1:
                    peer = Peer(server.accept()[0])
                    while not peer.host:
                        peer.listen()
                    peer.tell(rank=self.rank, host=self.host)
                    self.peers.append(peer)
            except OSError as error:
                missing = sorted({*range(1, self.world_size)} - {peer.rank for peer in self.peers})
                raise UserError(
                    f"rank 0 on {self.host} waited at port {port} for ranks {missing}, which did not connect "
                    f"({error}); they have ended, or their machines cannot reach this one: "
                    "open all TCP ports between the machines of a run."
                ) from error

    def _connect(self, address: str, port: int) -> None:
        try:
            rank_0 = Peer(socket.create_connection((address, port), CONNECT_SECONDS))
            rank_0.tell(rank=self.rank, host=self.host)
            while not rank_0.host:
                rank_0.listen()
        except OSError as error:
            raise UserError(
                f"rank {self.rank} on {self.host} cannot connect to rank 0 at {address}, port {port} ({error}); "
                "open all TCP ports between the machines of a run."
            ) from error
        self.peers.append(rank_0)

    def set_label(self, label: str) -> None:
        """Say what this rank does, for the sentence that tells of its death."""
        self._tell_all(label=label)

    def announce_failure(self) -> None:
        """End all others: a reason has been told, and they need not tell another."""
        self._tell_all(state=FAILED)

    def say_goodbye(self) -> None:
        """Stop watching, together with all others."""
        self._tell_all(state=GONE)
        self.thread.join()
        self._close()

    def _tell_all(self, **fields: int | str) -> None:
        for peer in self.peers:
            peer.tell(**fields)

    def _close(self) -> None:
        for peer in self.peers:
            peer.connection.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = key.data
                    try:
                        peer.listen()
                    except OSError:
                        self.on_loss(peer)
                    if peer.state == FAILED:
                        self.on_failure()
                    if peer.state == GONE:
                        selector.unregister(peer.connection)
