"""What a person sees of a ride: the live panel and the proof table. Draws what it is given; asks nobody."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tbox.bench.judge import Claim

BARS = " ▁▂▃▄▅▆▇█"
HISTORY = 60
LEVEL_STYLE = {1: "white", 2: "yellow", 3: "bright_red", 4: "bold white on red"}
ALARMS_SHOWN = 6
STORY_SHOWN = 5


class Panels:
    """The live view. Feed it a status and the story so far; `render` returns what to show."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._history: dict[str, deque[float]] = {}

    def render(
        self, elapsed_s: float, status: dict[str, Any], link_up: bool, story: Sequence[tuple[float, str]]
    ) -> RenderableType:
        edge, spool = status.get("edge", {}), status.get("spool", {})
        body = Table.grid(padding=(0, 2))
        for column in range(4):
            body.add_column(justify="left" if column % 2 else "right", style="" if column % 2 else "dim")
        state = status.get("uplink", {}).get("state", "-")
        link = Text(state, style="green" if state == "online" and link_up else "red")
        if not link_up:
            link.append("  (tunnel: packets vanish)", style="dim")
        body.add_row(
            "speed", self._gauge("speed", edge.get("speed_kmh"), "km/h", 130), "link", link
        )  # fmt: skip
        body.add_row(
            "SOC", self._gauge("soc", edge.get("soc_percent"), "%", 100),
            "spool", self._gauge("spool", spool.get("records"), "records waiting", None),
        )  # fmt: skip
        body.add_row(
            "hottest", self._gauge("hot", edge.get("hottest_c"), "°C", None),
            "mode", Text(str(edge.get("mode", "-"))),
        )  # fmt: skip
        body.add_row(
            "spread", self._gauge("spread", edge.get("spread_mv"), "mV", None),
            "isolation", Text(str(edge.get("isolation", {}).get("state", "-"))),
        )  # fmt: skip
        parts: list[RenderableType] = [body, Text("")]
        parts += [_alarm_line(alarm) for alarm in edge.get("alarms", [])[:ALARMS_SHOWN]]
        parts += [Text(f"{at_s:5.0f} s  {text}", style="cyan") for at_s, text in story[-STORY_SHOWN:]]
        parts.append(ProgressBar(total=self._seconds, completed=min(elapsed_s, self._seconds)))
        return Panel(Group(*parts), title="tbox demo", border_style="blue")

    def _gauge(self, name: str, value: float | None, unit: str, top: float | None) -> Text:
        if value is None:
            return Text("-", style="dim")
        history = self._history.setdefault(name, deque(maxlen=HISTORY))
        history.append(float(value))
        low = 0.0 if top else min(history)
        high = top or max(history)
        span = (high - low) or 1.0
        line = "".join(
            BARS[min(len(BARS) - 1, max(0, int((v - low) / span * (len(BARS) - 1))))]
            for v in list(history)[-20:]
        )
        return Text(f"{value:8.1f} {unit:<6} ") + Text(line, style="blue")


def _alarm_line(alarm: dict[str, Any]) -> Text:
    level = int(alarm.get("level", 1))
    return Text(f"  ● {alarm.get('text', '')}", style=LEVEL_STYLE.get(level, "white"))


def proof_table(claims: Sequence[Claim]) -> Table:
    """Return the proof: what was claimed, what was counted, whether it holds."""
    table = Table(title="Proof of the ride", show_lines=False)
    for heading in ("claim", "counted", "holds"):
        table.add_column(heading, overflow="fold")
    for claim in claims:
        mark = {True: "[green]yes", False: "[bold red]NO", None: "[dim]-"}[claim.holds]
        table.add_row(claim.text, claim.counted, mark)
    return table
