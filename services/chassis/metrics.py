"""A Prometheus page (exposition format 0.0.4) from plain numbers: counters and gauges.

page = Page()
page.add("kvstore_members", "gauge", "members alive", {"": 3})
page.add("kvstore_refusals_total", "counter", "by code", {'code="full"': 1})
"""

from __future__ import annotations

from collections.abc import Mapping


class Page:
    """Lines of one scrape; every name gets the prefix `tokenrelay_`."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, help_text: str, samples: Mapping[str, float]) -> None:
        """A counter or a gauge: labels (`code="full"`, or nothing) -> value."""
        self._lines += [f"# HELP tokenrelay_{name} {help_text}", f"# TYPE tokenrelay_{name} {kind}"]
        for labels, value in samples.items():
            braced = f"{{{labels}}}" if labels else ""
            self._lines.append(f"tokenrelay_{name}{braced} {value}")

    def text(self) -> str:
        """The page."""
        return "\n".join(self._lines) + "\n"
