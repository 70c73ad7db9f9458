"""The teacher's rows reach the student: between any two layouts, on the same ranks or on others.

Shapes: N rows (masked positions of a rank's slots, in the order of the slots), H width of a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from imdm_scale.parallel.flow_control import FlowControl
from imdm_scale.parallel.transport import Message, Traffic


class CorruptedMessage(RuntimeError):
    """Rows did not arrive as they were sent."""


@dataclass
class Pending:
    """An exchange that has begun. To be finished: until then it keeps alive what is sent and received."""

    update: int
    """Index of the update."""
    needed: Mapping[int, int] | None
    """Rows of each slot that this rank needs, in its order; None where it needs none."""
    transfers: list[dist.P2POp] = field(default_factory=list)
    """What goes through the group, with the buffers."""
    works: list[dist.Work] = field(default_factory=list)
    """What to wait for."""
    kept: list[tuple[Message, Tensor]] = field(default_factory=list)
    """Rows that this rank hands to itself."""
    received: list[tuple[Message, Tensor]] = field(default_factory=list)
    """Rows from other ranks, there when the exchange is finished."""
    checks: list[tuple[Message, Tensor, Tensor]] = field(default_factory=list)
    """Received rows, and what their sender says of them."""
    started: torch.cuda.Event | None = None
    """On CUDA, the point in the stream of the start at which the rows of this rank are computed."""


class HandOver:
    """One rank's part in handing the teacher's rows to the student, update by update.

    To make one is collective over `group`. Rows that stay on their rank do not pass through the group and are not
    copied where one message has all rows.

    Args:
        traffic: this rank's.
        group: over the whole world and used for nothing else. Its own time-out should be several times
            `teacher.timeout`, so that flow control speaks first.
        width: H, of a hidden state, or 1 for token ids.
        dtype: the rows'.
        device: the rows', this rank's.
        checksum: whether every message is verified (costs a copy of the rows to the CPU on either side).
        flow_control: where teacher and student have ranks of their own; None on shared ranks, which keep step.
    """

    def __init__(
        self,
        traffic: Traffic,
        group: dist.ProcessGroup,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        checksum: bool = False,
        flow_control: FlowControl | None = None,
    ) -> None:
        self.traffic = traffic
        self.group = group
        self.width = width
        self.dtype = dtype
        self.device = device
        self.checksum = checksum
        self.flow_control = flow_control
        self.bytes_received = 0
        """Bytes of rows that came from other ranks in the exchange finished last."""
        # NCCL makes a group's communicator in its first operation, in which all ranks must then take part.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    def exchange(
        self,
        update: int,
        rows_NH: Tensor | None = None,
        sent_counts: Sequence[int] | None = None,
        needed_counts: Sequence[int] | None = None,
    ) -> Tensor | None:
        """`start` and `finish` in one."""
        return self.finish(self.start(update, rows_NH, sent_counts, needed_counts))

    def start(
        self,
        update: int,
        rows_NH: Tensor | None = None,
        sent_counts: Sequence[int] | None = None,
        needed_counts: Sequence[int] | None = None,
    ) -> Pending:
        """Begin to send and to receive. All ranks that have a part start the same updates in the same order.

        Args:
            update: index of the update.
            rows_NH: on the teacher's last stage the rows of `traffic.held`, which must not be written to until
                the exchange is finished; None elsewhere.
            sent_counts: rows of each slot of `traffic.held`; None where it is empty.
            needed_counts: rows of each slot of `traffic.needed`; None where it is empty.

        Raises:
            UserError: the other side has not come within the time-out (with flow control).
        """
        mine = self.traffic
        pending = Pending(update, _by_slot(mine.needed, needed_counts))
        if mine.held:
            assert rows_NH is not None and sent_counts is not None, "this rank has rows"
            assert rows_NH.shape == (sum(sent_counts), self.width) and rows_NH.dtype == self.dtype
            rows_NH = rows_NH.detach().contiguous()
            held = dict(zip(mine.held, rows_NH.split(list(sent_counts)), strict=True))
            # Tensor-parallel ranks of the student get the same rows, from one buffer.
            buffers = {
                message.slots: rows_NH if message.slots == mine.held else _concatenate(held, message.slots)
                for message in (*mine.outgoing, *mine.kept)
            }
            pending.kept = [(message, buffers[message.slots]) for message in mine.kept]
            for message in mine.outgoing:
                self._send(pending, message, buffers[message.slots])
        for message in mine.incoming:
            self._receive(pending, message)
        if self.device.type == "cuda":
            pending.started = torch.cuda.current_stream(self.device).record_event()
        if self.flow_control is not None and mine.outgoing:
            self.flow_control.before_sending(update)
        if self.flow_control is not None and mine.incoming:
            self.flow_control.before_receiving(update)
        if pending.transfers:
            # In one batch: NCCL would wait forever for two ranks that both send first.
            pending.works = dist.batch_isend_irecv(pending.transfers)
        return pending

    def finish(self, pending: Pending) -> Tensor | None:
        """Wait until the exchange is done. On CUDA the current stream waits, not the process.

        Returns:
            The rows of `traffic.needed`, (N, H), in the order of its slots; None where it is empty. Rows that the
            rank handed to itself may be the very tensor that was passed.

        Raises:
            CorruptedMessage: with `checksum`, rows are not as they were sent.
        """
        for work in pending.works:
            work.wait()
        if pending.started is not None:
            # The rows come from the stream of the start and are read in this one.
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(pending.started)
            for _, rows_NH in (*pending.kept, *pending.received):
                rows_NH.record_stream(stream)
        for message, rows_NH, check in pending.checks:
            self._verify(pending.update, message, rows_NH, check)
        if self.flow_control is not None and self.traffic.incoming:
            self.flow_control.consumed(pending.update)
        self.bytes_received = sum(rows_NH.nbytes for _, rows_NH in pending.received)
        if pending.needed is None:
            return None
        arrived = [*pending.kept, *pending.received]
        if len(arrived) == 1:
            return arrived[0][1]
        rows_of_slot: dict[int, Tensor] = {}
        for message, rows_NH in arrived:
            counts = [pending.needed[slot] for slot in message.slots]
            rows_of_slot.update(zip(message.slots, rows_NH.split(counts), strict=True))
        return _concatenate(rows_of_slot, pending.needed)

    def _send(self, pending: Pending, message: Message, rows_NH: Tensor) -> None:
        if rows_NH.size(0) == 0:
            return
        pending.transfers.append(dist.P2POp(dist.isend, rows_NH, message.target, self.group))
        if self.checksum:
            check = torch.tensor([pending.update, rows_NH.size(0), crc32(rows_NH)], device=self.device)
            pending.transfers.append(dist.P2POp(dist.isend, check, message.target, self.group))

    def _receive(self, pending: Pending, message: Message) -> None:
        assert pending.needed is not None, "this rank needs rows"
        rows = sum(pending.needed[slot] for slot in message.slots)
        rows_NH = torch.empty(rows, self.width, dtype=self.dtype, device=self.device)
        pending.received.append((message, rows_NH))
        if rows == 0:
            return
        pending.transfers.append(dist.P2POp(dist.irecv, rows_NH, message.source, self.group))
        if self.checksum:
            check = torch.empty(3, dtype=torch.int64, device=self.device)
            pending.checks.append((message, rows_NH, check))
            pending.transfers.append(dist.P2POp(dist.irecv, check, message.source, self.group))

    def _verify(self, update: int, message: Message, rows_NH: Tensor, check: Tensor) -> None:
        expected, found = check.tolist(), [update, rows_NH.size(0), crc32(rows_NH)]
        if expected != found:
            raise CorruptedMessage(
                f"update {update}: the rows from rank {message.source} to rank {message.target} did not arrive as "
                f"they were sent: (update, rows, crc32) was {tuple(expected)} and is {tuple(found)}"
            )


def crc32(rows_NH: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(rows_NH.view(torch.uint8).cpu().numpy())


def _by_slot(slots: Sequence[int], counts: Sequence[int] | None) -> dict[int, int] | None:
    if not slots:
        return None
    assert counts is not None, "this rank needs rows"
    return dict(zip(slots, counts, strict=True))


def _concatenate(rows_of_slot: Mapping[int, Tensor], slots: Iterable[int]) -> Tensor:
    return torch.cat([rows_of_slot[slot] for slot in slots])
