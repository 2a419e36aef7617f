"""The commands. Whichever is imported, Ctrl-C ends it from here on without a traceback."""

import sys
from types import TracebackType

_shown = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    # What `run` in common.py does once a command has been imported, which takes a second or more.
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    _shown(kind, error, traceback)


sys.excepthook = _show
