"""The picture of one number a head, layer by head, that attributions and attention share."""

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    import altair as alt


def head_map(
    frame: pd.DataFrame, *, title: str, value_title: str, what: str, diverging: bool = True
) -> "alt.LayerChart":
    """Draw `estimate` by `layer` and `head`; the description says what it is, and which heads lie at the ends."""
    from rim_core import charts

    frame = frame.astype({"layer": int, "head": int})
    ends = "; ".join(
        f"{name}: layer {row['layer']:.0f}, head {row['head']:.0f} with {row['estimate']:.3g}"
        for name, row in (
            ("highest", frame.iloc[int(frame["estimate"].argmax())]),
            ("lowest", frame.iloc[int(frame["estimate"].argmin())]),
        )
    )
    return charts.heatmap(
        frame,
        "estimate",
        x="head",
        y="layer",
        title=title,
        x_title="head",
        y_title="layer",
        value_title=value_title,
        description=f"{what}, mean of {frame['n'].max()} texts; {ends}; mean of all {frame['estimate'].mean():.3g}.",
        diverging=diverging,
    )
