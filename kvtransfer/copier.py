"""A thread for each peer that carries out its pulls slice by slice, so that they can be fenced."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from engine.errors import PeerLost, TransferError, TransportError
from kvtransfer.transport import Ending, PullState

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtransfer.plan import Copies
    from kvtransfer.transport import TransportLimits


class SlicedPull(PullState):
    """Copies waiting for, or in the hands of, a `Copier`."""

    def __init__(self, copies: Copies, limits: TransportLimits) -> None:
        super().__init__()
        self._copies = copies
        self._limits = limits
        self._claim = threading.Lock()
        """Taken once: by the thread that starts the pull, or by whoever ends it before."""
        self._cancelling = False

    def cancel(self, timeout_s: float | None = None) -> None:
        self._cancelling = True
        self.end_unstarted(Ending.CANCELLED)
        timeout_s = self._limits.fence_timeout_s if timeout_s is None else timeout_s
        if not self.wait_fenced(timeout_s):
            raise TransportError(f"a copy could not be fenced within {timeout_s:g} s")

    def end_unstarted(self, ending: Ending, error: TransferError | None = None) -> None:
        if self._claim.acquire(blocking=False):
            self.end(ending, error)

    def run(self, copy: Callable[[Copies, SlicedPull], None]) -> None:
        """Every slice in order; ends the pull in whatever way it ended."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            ending, error = self._run_slices(copy), None
        except TransferError as failure:
            ending, error = Ending.FAILED, failure
        except BaseException:
            self.end(Ending.FAILED, TransportError("the copying thread failed"))
            raise
        self.end(ending, error)

    def _run_slices(self, copy: Callable[[Copies, SlicedPull], None]) -> Ending:
        for part in self._copies.slices(self._limits.slice_bytes):
            if self._cancelling:
                return Ending.CANCELLED
            copy(part, self)
        return Ending.DONE


class Copier:
    """Runs the pulls from one peer, in order. A stuck peer holds up nobody else."""

    def __init__(
        self, name: str, copy: Callable[[Copies, SlicedPull], None], limits: TransportLimits
    ) -> None:
        self._copy = copy
        self._limits = limits
        self._waiting: queue.SimpleQueue[SlicedPull | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished: list[SlicedPull] = []
        self._refusal: TransportError | None = None
        self._thread = threading.Thread(target=self._run, name=f"pull {name}", daemon=True)
        self._thread.start()

    def submit(self, copies: Copies) -> SlicedPull:
        pull = SlicedPull(copies, self._limits)
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            self._unfinished = [old for old in self._unfinished if not old.fenced]
            if len(self._unfinished) >= self._limits.queued_pulls:
                raise TransportError(f"queued_pulls: {self._limits.queued_pulls} wait already")
            self._unfinished.append(pull)
            self._waiting.put(pull)
        return pull

    def lose(self, pull: SlicedPull, lost: PeerLost) -> None:
        """Tells everyone at once; `pull` may still be written to until its slice has ended."""
        pull.settle(Ending.FAILED, lost)
        self._refuse(lost)

    def _refuse(self, error: TransportError) -> list[SlicedPull]:
        """Nothing more is begun; returns what has begun."""
        with self._lock:
            self._refusal = error
            pulls = list(self._unfinished)
        for pull in pulls:
            pull.end_unstarted(Ending.FAILED, error)
        return pulls

    def stop(self) -> None:
        """Fences every pull and ends the thread; TransportError if one cannot be fenced."""
        for pull in self._refuse(TransportError("the peer has been disconnected")):
            pull.cancel()
        self._waiting.put(None)
        self._thread.join(self._limits.fence_timeout_s)

    def _run(self) -> None:
        while (pull := self._waiting.get()) is not None:
            pull.run(self._copy_or_lose)

    def _copy_or_lose(self, part: Copies, pull: SlicedPull) -> None:
        """Once a peer is lost, it stays lost until it is connected anew."""
        try:
            self._copy(part, pull)
        except PeerLost as lost:
            self.lose(pull, lost)
            raise
