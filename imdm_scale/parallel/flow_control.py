"""How far the teacher may work ahead of the student, where they have ranks of their own.

Each rank that sends announces an update before it sends, each rank that receives says when it has consumed one; both
are keys in the rendezvous store, under which the other side waits. So a receive is posted only when the
send is certain, and a side that stays away is named.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta

import torch.distributed as dist

from imdm_scale.errors import UserError
from imdm_scale.parallel.transport import Traffic


class FlowControl:
    """One rank's part; three store operations an update.

    Every call's `update` is one after the last's. A key is deleted when all that wait for it are known to have seen
    it, so a rank never has more than `depth` keys in the store.

    Args:
        traffic: this rank's; it sends or receives, or does neither.
        store: not shared with other threads, which a wait would block (`compat.default_store().clone()`).
        depth: updates that may be announced and not yet consumed, at least 1 (`teacher.prefetch`).
        timeout: seconds that a side waits for the other (`teacher.timeout`).
    """

    def __init__(self, traffic: Traffic, store: dist.Store, *, depth: int, timeout: float) -> None:
        assert depth >= 1, "the student can only consume what has been announced"
        self.rank = traffic.rank
        self.receivers = sorted(message.target for message in traffic.outgoing)
        self.senders = sorted(message.source for message in traffic.incoming)
        assert not (self.receivers and self.senders), "no rank belongs to both sides"
        self.store = store
        self.depth = depth
        self.timeout = timeout
        self.in_flight: deque[int] = deque()

    def before_sending(self, update: int) -> None:
        """Wait until all receivers have consumed the update `depth` before this one, then announce this one.

        Raises:
            UserError: a receiver has not consumed it within the time-out.
        """
        if len(self.in_flight) == self.depth:
            self._wait_for_oldest()
        self.store.set(_announced(self.rank, update), "")
        self.in_flight.append(update)

    def drain(self) -> None:
        """Wait until all receivers have consumed all that was announced.

        Raises:
            UserError: a receiver has not consumed it within the time-out.
        """
        while self.receivers and self.in_flight:
            self._wait_for_oldest()

    def is_announced(self, update: int) -> bool:
        """Whether all senders have announced an update, so that `before_receiving` would not wait."""
        return self.store.check([_announced(rank, update) for rank in self.senders])

    def before_receiving(self, update: int) -> None:
        """Wait until all senders have announced an update.

        Raises:
            UserError: a sender has not announced it within the time-out.
        """
        late = self._wait([_announced(rank, update) for rank in self.senders], self.senders)
        if late:
            raise UserError(
                f"the teacher ({_ranks(late)}) has not announced update {update} for {self.timeout:g} s, and the "
                f"student (rank {self.rank}) waits for it; see what holds these ranks up, or raise "
                "teacher.timeout."
            )

    def consumed(self, update: int) -> None:
        """Tell the senders that this rank has received an update."""
        self.store.set(_consumed(self.rank, update), "")
        self.in_flight.append(update)
        if len(self.in_flight) > self.depth:
            # To announce `update`, every sender has waited for this one.
            self.store.delete_key(_consumed(self.rank, self.in_flight.popleft()))

    def _wait_for_oldest(self) -> None:
        oldest = self.in_flight.popleft()
        late = self._wait([_consumed(rank, oldest) for rank in self.receivers], self.receivers)
        if late:
            raise UserError(
                f"the student ({_ranks(late)}) has not consumed update {oldest} for {self.timeout:g} s, and the "
                f"teacher (rank {self.rank}), which works ahead by {self.depth} (teacher.prefetch), waits for that; "
                "see what holds these ranks up, or raise teacher.timeout."
            )
        self.store.delete_key(_announced(self.rank, oldest))

    def _wait(self, keys: list[str], ranks: list[int]) -> list[int]:
        """The ranks whose key is not there when the time is over."""
        try:
            self.store.wait(keys, timedelta(seconds=self.timeout))
        except RuntimeError:  # a time-out; where the store is lost, the check says so
            return [rank for rank, key in zip(ranks, keys, strict=True) if not self.store.check([key])]
        return []


def _announced(rank: int, update: int) -> str:
    return f"imdm_scale/transport/announced/{rank}/{update}"


def _consumed(rank: int, update: int) -> str:
    return f"imdm_scale/transport/consumed/{rank}/{update}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
