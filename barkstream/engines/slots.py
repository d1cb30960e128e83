"""KV cache slots: a fixed pool that streams share. The stream that was used least recently gives its slot up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from barkstream.engines import Row
from barkstream.sampling import Ints


@dataclass
class Slot:
    """A place in a KV cache: what it holds is `ids` [n, C], the prefix that its keys and values belong to."""

    ids: Ints

    def n_known(self, ids: Ints) -> int:
        """Leading positions of a prefix [S, C] that the cache holds."""
        if self.ids is ids or self.ids.base is ids:  # leading ones of this very array: nobody writes to a prefix
            return len(self.ids)
        n = min(len(self.ids), len(ids))
        if self.ids.shape[1:] != ids.shape[1:]:
            return 0
        differs = (self.ids[:n] != ids[:n]).ravel()
        first = int(differs.argmax()) if n else 0
        return first // ids.shape[1] if n and differs[first] else n


AnySlot = TypeVar("AnySlot", bound=Slot)


class Slots(Generic[AnySlot]):
    """The pool. One thread at a time may use it."""

    def __init__(self, slots: Sequence[AnySlot]):
        self._n, self._free = len(slots), list(slots)
        self._owned: OrderedDict[int, AnySlot] = OrderedDict()  # by stream, least recently used first

    @property
    def n_owned(self) -> int:
        """Slots that streams hold now, those of a call under way included."""
        return self._n - len(self._free)

    def release(self, stream: int) -> None:
        """Free a stream's slot; nothing happens if it has none."""
        slot = self._owned.pop(stream, None)
        if slot is not None:
            self._free.append(slot)

    @contextmanager
    def lease(self, rows: Sequence[Row]) -> Iterator[list[AnySlot]]:
        """`take`, for as long as the block lasts."""
        slots = self.take(rows)
        try:
            yield slots
        finally:
            self.give_back(rows, slots)

    def take(self, rows: Sequence[Row]) -> list[AnySlot]:
        """A slot for each row: its stream's, or a free one, or that of the stream that was used least recently.

        At most as many rows as there are slots. They have to be given back.
        """
        return [self._owned.pop(row.stream, None) or self._free_slot() for row in rows]

    def give_back(self, rows: Sequence[Row], slots: Sequence[AnySlot]) -> None:
        """What was taken. A row without a stream keeps none, nor does a stream's second row."""
        for row, slot in zip(rows, slots, strict=True):
            if row.stream and row.stream not in self._owned:
                self._owned[row.stream] = slot
            else:
                self._free.append(slot)

    def _free_slot(self) -> AnySlot:
        return self._free.pop() if self._free else self._owned.popitem(last=False)[1]
