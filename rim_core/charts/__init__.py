"""The book's figures: Altair charts that draw offline, in light and dark, with a description and their data.

Each function takes a table and draws its column `estimate`, with the interval of its columns `low` and `high`; titles
and description are made of the table unless they are given. What comes back is an Altair chart: `a & b` puts one below
another, `a | b` beside it, and `save` writes either to a file that opens without a network.

- `by_layer`: lines with bands over layers, tokens or ranks; `intervals`: dots with intervals, a row a label.
- `heatmap`: cells over two columns, such as layer and head; `distribution`: histograms; `scatter`: points.
- `save`: to a file. `render`: to what a notebook stores.

Importing this package enables the theme and the renderer `rim`, which refuses a chart without a description, so that
no figure is lost on a reader who cannot see it.
"""

from typing import Any

from rim_core.charts._drawing import PALETTE, render, save
from rim_core.charts._figures import by_layer, distribution, heatmap, intervals, scatter
from rim_core.paths import did_you_mean

__all__ = ["PALETTE", "by_layer", "distribution", "heatmap", "intervals", "render", "save", "scatter"]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"rim.charts has no {name!r}{did_you_mean(name, __all__)}")
