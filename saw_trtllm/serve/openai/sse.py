"""Server-sent events, as OpenAI's API writes them."""

from __future__ import annotations

import json
from typing import Any

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

#: The last one.
DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """An event that holds JSON."""
    return b"data: " + _encode(body).encode() + b"\n\n"
