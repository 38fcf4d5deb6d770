"""Which pieces of documents share a window: first-fit and best-fit bin packing, longest pieces first.

Whole pieces, unlike windows cut from a stream of documents: no context is lost at a window's edge, and what doesn't fit
is padding. Best-fit on language-model data: arXiv 2404.10830; packing encoders: arXiv 2107.02027.
"""

from __future__ import annotations

import heapq
import sys

import numpy as np
from numpy.typing import NDArray

_NONE = sys.maxsize


def fit_windows(lengths: NDArray[np.int64], window: int, best: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack pieces of 1 to `window` tokens into windows, by decreasing length.

    First-fit puts a piece into the oldest window that has room for it, best-fit into the fullest one.

    Returns:
        (pieces, starts): window w holds pieces[starts[w] : starts[w + 1]], numbers into `lengths`. O(n log window).
    """
    order = np.argsort(-lengths, kind="stable")
    window_of = np.empty(len(lengths), dtype=np.int64)
    full = int((lengths == window).sum())
    window_of[order[:full]] = np.arange(full)
    rooms = _Rooms(window, full)
    for piece in order[full:].tolist():
        window_of[piece] = rooms.take(int(lengths[piece]), best)
    pieces = np.argsort(window_of, kind="stable")
    return pieces, np.concatenate([[0], np.cumsum(np.bincount(window_of, minlength=rooms.windows))])


class _Rooms:
    """Windows by the room that is left in them, in a binary tree over rooms: a node knows its oldest window."""

    def __init__(self, window: int, windows: int) -> None:
        self._window, self.windows = window, windows
        self._heaps: list[list[int]] = [[] for _ in range(window + 1)]
        self._leaves = 1 << window.bit_length()
        self._oldest = [_NONE] * (2 * self._leaves)

    def take(self, length: int, best: bool) -> int:
        """Put a piece into a window; returns the window's number."""
        node = self._find(length, best)
        if node is None:
            number, room = self.windows, self._window
            self.windows += 1
        else:
            room = node - self._leaves
            number = heapq.heappop(self._heaps[room])
            self._update(room)
        if room > length:
            heapq.heappush(self._heaps[room - length], number)
            self._update(room - length)
        return number

    def _find(self, length: int, best: bool) -> int | None:
        """Leaf of the smallest room of at least `length`, or of the room that the oldest such window has."""
        nodes, node = [], self._leaves + length
        nodes.append(node)
        while node > 1:
            if not node & 1:
                nodes.append(node + 1)  # all of its rooms are larger
            node >>= 1
        # From the smallest rooms to the largest.
        filled = [node for node in nodes if self._oldest[node] != _NONE]
        if not filled:
            return None
        node = filled[0] if best else min(filled, key=self._oldest.__getitem__)
        while node < self._leaves:
            left, right = 2 * node, 2 * node + 1
            if best:
                node = left if self._oldest[left] != _NONE else right
            else:
                node = left if self._oldest[left] == self._oldest[node] else right
        return node

    def _update(self, room: int) -> None:
        node = self._leaves + room
        self._oldest[node] = self._heaps[room][0] if self._heaps[room] else _NONE
        while node > 1:
            node >>= 1
            self._oldest[node] = min(self._oldest[2 * node], self._oldest[2 * node + 1])
