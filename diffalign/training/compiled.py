"""What torch.compile does while a run goes on: graphs that are made late, and a silent return to eager."""

from __future__ import annotations

from torch._dynamo.utils import counters

_LIMIT = "Dynamo recompile limit exceeded"


class Graphs:
    """Counts this process's graphs from now on."""

    def __init__(self) -> None:
        self._graphs, self._limits = _count(), _at_limit()

    def news(self) -> list[str]:
        """What has happened since the last call, in lines to say."""
        graphs, limits = _count(), _at_limit()
        lines = []
        if graphs > self._graphs:
            made = graphs - self._graphs
            lines.append(f"compile: {made} graph{'s' if made > 1 else ''} made, {graphs} in all")
        if limits > self._limits:
            lines.append(
                "compile: torch.compile has reached its limit of graphs and runs what is new without them, "
                "slower and with other last bits: fix the shapes (preprocess.buckets=square), or set "
                "compile=false"
            )
        self._graphs, self._limits = graphs, limits
        return lines


def _count() -> int:
    return int(counters["stats"]["unique_graphs"])


def _at_limit() -> int:
    return sum(count for name, count in counters["unimplemented"].items() if name.startswith(_LIMIT))
