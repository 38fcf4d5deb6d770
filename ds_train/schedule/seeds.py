"""Seeds of random draws, as pure functions of what they are for."""

from __future__ import annotations

import hashlib


def fold_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
