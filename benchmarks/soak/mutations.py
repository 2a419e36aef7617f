"""Damage, at random: of bytes and of JSON."""

from __future__ import annotations

import json
from random import Random
from typing import Any

#: What stands in a field that should hold something else. No number is a plausible size of something to allocate.
HOSTILE = [
    *(None, True, "", "x", "\0", "é" * 300, [], [[]], {}, {"a": {}}),
    *(-1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, float("inf"), float("nan"), [1, "a"], ["x"] * 50),
]


def mutate_json(document: Any, rng: Random) -> Any:
    """Replace, remove or nest one value of a document, which is changed in place, or the document itself."""
    places = list(_places(document))
    if not places or rng.random() < 0.03:
        return rng.choice(HOSTILE)
    parent, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = [parent[key]]
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice(["x", "", "\n", key + "_"])] = parent.pop(key)
    else:
        parent[key] = rng.choice(HOSTILE)
    return document


def _places(node: Any) -> Any:
    """Each container of a document with each of its keys."""
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from _places(node[key])


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Cut, extend, overwrite, flip or nest."""
    kind = rng.randrange(7)
    place = rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return b""
    if kind == 2:
        return data + rng.randbytes(rng.randrange(1, 100))
    if kind == 3:
        return data[:place] + rng.randbytes(16) + data[place + 16 :]
    if kind == 4:
        return b"[" * 100_000 if len(data) < 1_000_000 else data[8:]
    near = rng.randrange(min(len(data), 2000)) if data else 0  # headers are at the front
    return data[:near] + bytes([data[near] ^ 1 << rng.randrange(8)]) + data[near + 1 :] if data else b"\0"


def mutate_text(data: bytes, rng: Random) -> bytes:
    """Damage JSON, as a document or as bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    return json.dumps(mutate_json(json.loads(data), rng)).encode()


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """Damage the header's document, or bytes anywhere."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate_json(json.loads(data[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
