"""What commands print."""

import json
import sys
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


def print_json(value: Any) -> None:
    """Print a value as JSON that stays JSON whatever characters the output can write."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=1, ensure_ascii=not unicode, allow_nan=False))
