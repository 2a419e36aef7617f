"""How the ranks of a tensor parallel engine run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from saw_trtllm.errors import ConfigError
from saw_trtllm.runtime.keywords import check_keywords, config_of, is_number, shown

_LAUNCHERS = ("ray", "processes")


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a tensor parallel engine run, and when they count as lost.

    Parameters
    ----------
    ranks : {"ray", "processes"}
        Who starts them: Ray, on the cluster that RAY_ADDRESS names or on one of its own on this machine; or plain
        processes on this machine, a GPU each, where there is no Ray.
    step_timeout : float
        Seconds that a step may take: a rank that has not answered by then hangs, and the group starts anew.
    start_timeout : float
        Seconds that the ranks may take to load the engine.

    Raises
    ------
    ConfigError
        If a time is not above 0, or a name is not one of these.
    """

    ranks: Literal["ray", "processes"] = "ray"
    step_timeout: float = 60.0
    start_timeout: float = 1800.0

    def __new__(cls, *_: Any, **named: Any) -> ParallelConfig:
        """Reject the names of arguments that it does not have."""
        check_keywords(cls.__name__, named, [f.name for f in fields(cls)], ConfigError)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.ranks not in _LAUNCHERS:
            raise ConfigError(f"ranks is {shown(self.ranks)}: it must be one of {', '.join(_LAUNCHERS)}")
        for name in ("step_timeout", "start_timeout"):
            seconds = getattr(self, name)
            if not (is_number(seconds) and 0 < seconds < float("inf")):
                raise ConfigError(f"{name} is {shown(seconds)}: it must be a number of seconds above 0")

    @classmethod
    def of(cls, value: ParallelConfig | Mapping[str, Any] | None) -> ParallelConfig:
        """Make one out of what a user gives; see :func:`saw_trtllm.runtime.keywords.config_of`."""
        return config_of(cls, value, "parallel_config")
