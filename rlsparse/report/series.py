"""The groups of runs (cells, and their controls) as series: index, label, style and legend."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlsparse.report.rows import Row, short_labels
from rlsparse.report.svg import Style, style, tag

MAX_LABEL = 44


@dataclass(frozen=True)
class Series:
    """Groups in the order of ``rows.cell_rows``: every chart shows a group in the same style.

    Attributes:
        index: group -> place, as ``data-c`` says it.
        labels: group -> label of at most ``MAX_LABEL`` characters.
        cells: rows of the groups.
    """

    index: dict[str, int]
    labels: dict[str, str]
    cells: Sequence[Row]

    def style(self, group: str) -> Style:
        """Colour and shape of a group."""
        return style(self.index[group])

    def kind(self, group: str) -> str:
        """``hollow`` for the marks of controls."""
        return "hollow" if self.cells[self.index[group]]["role"] == "control" else ""

    def ids(self, *groups: str) -> str:
        """Places of groups, for ``data-c``."""
        return " ".join(str(place) for place in sorted({self.index[group] for group in groups}))

    def with_level(self, levels: dict[str, str]) -> str:
        """Places of the groups that have all of these levels, where they have the factor."""
        return " ".join(
            str(self.index[cell["group"]])
            for cell in self.cells
            if all(cell["cell"].get(path, level) == level for path, level in levels.items())
        )

    def shown(self, most: int) -> list[str]:
        """At most ``most`` groups with finished runs, no controls: those nearest to the baseline.

        Nearest is what differs from the first cell in the fewest factors.
        """
        done = [c for c in self.cells if c["num_finished"] and c["role"] != "control"]
        base = done[0]["cell"] if done else {}
        nearest = sorted(done, key=lambda c: sum(base.get(k, v) != v for k, v in c["cell"].items()))
        kept = {cell["group"] for cell in nearest[:most]}
        return [cell["group"] for cell in done if cell["group"] in kept]

    def swatch(self, group: str) -> Markup:
        """The mark of a group, for tables and legends."""
        colour, shape = self.style(group)
        name = f"mark s{colour} {self.kind(group)}".strip()
        mark = tag("use", href=f"#m{shape}", class_=name, x="7", y="7")
        return tag("svg", mark, class_="swatch", width="14", height="14", aria_hidden="true")

    def legend(self, groups: Sequence[str]) -> Markup:
        """Marks and labels of ``groups``, as a list."""
        items = [
            tag("li", self.swatch(group), self.labels[group], data_c=self.ids(group))
            for group in groups
        ]
        return tag("ul", *items, class_="legend") if len(items) > 1 else Markup()


def series_of(cells: Sequence[Row]) -> Series:
    """Series of the rows of ``rows.cell_rows``."""
    groups = [cell["group"] for cell in cells]
    labels = short_labels(groups, MAX_LABEL)
    return Series(
        {group: i for i, group in enumerate(groups)}, dict(zip(groups, labels, strict=True)), cells
    )
