"""A task of short programs: what a model writes is run, and must give what a reference gives."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

#: Seconds that a program may take.
_TIMEOUT = 2
_INTEGERS = [[x] for x in (-7, 0, 1, 3, 4, 12, 35)]
_WORDS = [[s] for s in ("", "a", "winter", "Open the gate")]
_LISTS = [[x] for x in ([], [3], [1, 2, 3, 4, 5, 6], [5, 5, 2, 9, 7, 4, 8])]
_PAIRS = [[a, b] for a in (-2, 0, 3) for b in (1, 5)]
#: Arguments, what is asked for, a reference, and what both are called with.
_KINDS = (
    ("x", "Return x plus {n}.", "x + {n}", _INTEGERS),
    ("x", "Return {n} times x.", "{n} * x", _INTEGERS),
    ("x", "Return the square of x minus {n}.", "x**2 - {n}", _INTEGERS),
    ("x", "Return True if x is greater than {n}.", "x > {n}", _INTEGERS),
    ("x", "Return True if x is divisible by {n}.", "x % {n} == 0", _INTEGERS),
    ("x", "Return the remainder of x divided by {n}.", "x % {n}", _INTEGERS),
    ("x", "Return the larger of x and {n}.", "max(x, {n})", _INTEGERS),
    ("x", "Return x as a string.", "str(x)", _INTEGERS),
    ("s", "Return the first {n} characters of s.", "s[:{n}]", _WORDS),
    ("s", "Return the last {n} characters of s.", "s[-{n}:]", _WORDS),
    ("s", "Return s repeated {n} times.", "s * {n}", _WORDS),
    ("s", "Return s in upper case.", "s.upper()", _WORDS),
    ("s", "Return the length of s plus {n}.", "len(s) + {n}", _WORDS),
    ("s", "Return s in reverse order.", "s[::-1]", _WORDS),
    ("items", "Return the first {n} items.", "items[:{n}]", _LISTS),
    ("items", "Return the sum of the items plus {n}.", "sum(items) + {n}", _LISTS),
    ("items", "Return True if {n} is in items.", "{n} in items", _LISTS),
    ("items", "Return how often {n} is in items.", "items.count({n})", _LISTS),
    ("items", "Return each item times {n}.", "[{n} * x for x in items]", _LISTS),
    ("items", "Return the items that are greater than {n}.", "[x for x in items if x > {n}]", _LISTS),
    ("a, b", "Return the sum of a and b.", "a + b", _PAIRS),
    ("a, b", "Return a times b plus {n}.", "a * b + {n}", _PAIRS),
    ("a, b", "Return True if a is less than b.", "a < b", _PAIRS),
)
_SHOTS = (("x", "Return x minus 4.", "x - 4"), ("items", "Return the last item.", "items[-1]"))
_RUN = """
import json, sys
source, reference, calls = json.load(sys.stdin)
spaces = [{}, {}]
for space, code in zip(spaces, (source, reference)):
    exec(code, space)
same = all(spaces[0]["f"](*a) == spaces[1]["f"](*a) for a in calls)
sys.exit(0 if same else 1)
"""


def programs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Functions of one line whose heads are given, after two that are whole."""
    rng = random.Random(seed)
    solved = "".join(f"{_head(args, text)} {body}\n\n\n" for args, text, body in _SHOTS)
    documents = []
    for i in range(count):
        args, text, body, calls = _KINDS[i % len(_KINDS)]
        n = rng.randrange(2, 10)
        head = _head(args, text.format(n=n))
        documents.append(
            {"prompt": solved + head, "head": head, "answer": f" {body.format(n=n)}", "calls": json.dumps(calls)}
        )
    return documents


def is_right(document: dict[str, Any], answer: str) -> bool:
    """Whether a program does what its reference does, in a process of its own: it may be wrong in any way."""
    sources = [document["head"] + body for body in (answer, document["answer"])]
    work = json.dumps([*sources, json.loads(document["calls"])])
    command = [sys.executable, "-I", "-c", _RUN]
    try:
        return subprocess.run(command, input=work, text=True, timeout=_TIMEOUT, capture_output=True).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """What the harness calls with a document and what was generated for it."""
    return {"acc": float(is_right(document, results[0]))}


def _head(args: str, text: str) -> str:
    return f'def f({args}):\n    """{text}"""\n    return'
