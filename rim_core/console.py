"""What commands print."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as aligned columns, with the first row's keys as the heading."""
    if not rows:
        return
    heading = list(rows[0])
    lines = [heading, *([str(row.get(key, "")) for key in heading] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
