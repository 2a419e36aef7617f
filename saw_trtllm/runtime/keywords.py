"""Checks of what users pass as arguments, and how a message shows it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from saw_trtllm.errors import ConfigError

_Config = TypeVar("_Config")


def check_keywords(
    what: str,
    given: Iterable[str],
    known: Iterable[str],
    error: type[Exception],
    advice: Mapping[str, str] | None = None,
) -> None:
    """Raise ``error`` for the first name that is not known.

    Parameters
    ----------
    what : str
        What takes the arguments.
    given, known : iterable of str
    error : type
    advice : dict, optional
        What to do about names that users bring from elsewhere.
    """
    known = list(known)
    unknown = next((name for name in given if name not in known), None)
    if unknown is None:
        return
    todo = (advice or {}).get(unknown)
    if todo is None:
        close = difflib.get_close_matches(unknown, known, 1)
        todo = f"write {close[0]}" if close else f"leave it out; there are {', '.join(known)}"
    raise error(f"{what} has no {unknown}: {todo}")


def config_of(kind: type[_Config], value: _Config | Mapping[str, Any] | None, what: str) -> _Config:
    """Make a config out of what a user gives for ``what``: a config, its fields as a dict, or None for the defaults.

    Raises
    ------
    ConfigError
        If it is none of them.
    """
    if isinstance(value, kind):
        return value
    if value is None or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        return kind(**(value or {}))
    raise ConfigError(f"{what} is {shown(value)}: give a {kind.__name__}, or its fields as a dict")


def is_number(value: Any, whole: bool = False) -> bool:
    """Whether a value is a number of Python's or NumPy's, which a truth value is not."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool)


def is_text(value: str) -> bool:
    """Whether it has whole characters alone: a lone surrogate is half of one, and no text has it."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def shown(value: Any) -> str:
    """A value for a message, shortened. Python itself does not print whole numbers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
