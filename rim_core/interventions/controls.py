"""Controls: heads, sets of heads and directions drawn at random, and a set of heads judged against such sets."""

import inspect
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rim_core.checking import is_whole, number, shown, whole
from rim_core.errors import InputError
from rim_core.interventions.ablation import Reference, ablate
from rim_core.interventions.components import Unit, units_of
from rim_core.models.model import Model

if TYPE_CHECKING:
    import altair as alt


def random_heads(
    model: Model, n: int, *, exclude: Sequence[Unit] = (), layers: Sequence[int] | None = None, seed: int = 0
) -> list[Unit]:
    """`n` different heads drawn uniformly as a control, in ascending order.

    Args:
        model: a loaded model.
        n: how many.
        exclude: `(layer, head)` pairs not to draw, such as those under test.
        layers: draw from these only; by default from all.
        seed: of the draw.

    Raises:
        InputError: heads or layers that do not exist, or fewer than `n` to draw from.

    Example:
        >>> drawn = rim.random_heads(model, 2, exclude=[(0, 0)], layers=[0])
        >>> len(drawn), (0, 0) in drawn
        (2, False)
    """
    n, seed = whole(n, "random_heads: n"), whole(seed, "random_heads: seed")
    pool = _pool(model, exclude, layers)
    if not 1 <= n <= len(pool):
        raise InputError(f"cannot draw {n} heads: there are {len(pool)} to draw from")
    return sorted(random.Random(seed).sample(pool, n))


def random_sets(
    model: Model, heads: Sequence[Unit], *, n_sets: int = 20, per_layer: bool = False, seed: int = 0
) -> list[list[Unit]]:
    """Different random sets of as many heads as `heads`, none of which they hold: its control distribution.

    Args:
        model: a loaded model.
        heads: `(layer, head)` pairs under test.
        n_sets: how many sets.
        per_layer: draw as many heads in each layer as `heads` has there, so that depth is no difference.
        seed: of the draw.

    Raises:
        InputError: heads that do not exist, or fewer different sets than `n_sets`.

    Example:
        >>> sets = rim.random_sets(model, [(0, 0), (1, 1)], n_sets=3, per_layer=True)
        >>> [[layer for layer, head in drawn] for drawn in sets]
        [[0, 1], [0, 1], [0, 1]]
    """
    n_sets, seed = whole(n_sets, "random_sets: n_sets"), whole(seed, "random_sets: seed")
    if not len(heads):
        raise InputError("random_sets: no heads were given: pass the heads under test")
    counts = Counter(layer for layer, _ in units_of(model, heads, "heads"))
    if per_layer:
        strata = [(_pool(model, heads, [layer]), count) for layer, count in sorted(counts.items())]
    else:
        strata = [(_pool(model, heads, None), len(heads))]
    possible = math.prod(math.comb(len(pool), count) for pool, count in strata)
    if not 1 <= n_sets <= possible:
        raise InputError(f"cannot draw {n_sets} different sets of {len(heads)} other heads: there are {possible}")
    source = random.Random(seed)
    found: dict[tuple[Unit, ...], None] = {}
    while len(found) < n_sets:
        drawn = [head for pool, count in strata for head in source.sample(pool, count)]
        found[tuple(sorted(drawn))] = None
    return [list(drawn) for drawn in found]


def _pool(model: Model, exclude: Sequence[Unit], layers: Sequence[int] | None) -> list[Unit]:
    left_out = set(units_of(model, exclude, "heads"))
    every = [(layer, head) for layer in sorted(set(model.checked_layers(layers))) for head in range(model.n_heads)]
    return [pair for pair in every if pair not in left_out]


def random_direction(like: Any, *, seed: int = 0) -> Tensor:
    """A placebo for `like`: the same, turned at random, float32 on the CPU.

    Of one direction `[d_model]` this is a random direction of the same length. Directions of several layers
    `[layer, d_model]` are turned together, so that their lengths and the angles between them stay: drawn one by one
    they would not add up over layers as the real ones do.

    Args:
        like: the direction or directions. A width gives one direction of length 1.
        seed: of the draw.

    Raises:
        InputError: another shape, or numbers that are not finite.

    Example:
        >>> import torch
        >>> placebo = rim.random_direction(torch.tensor([3.0, 4.0, 0.0]))
        >>> round(float(placebo.norm()), 4)
        5.0
    """
    seed = whole(seed, "random_direction: seed", 0)
    given = torch.eye(1, whole(like, "width", 1))[0] if is_whole(like) else torch.as_tensor(like).cpu()
    rows = torch.atleast_2d(given.double())
    if rows.dim() != 2 or not rows.numel() or not rows.isfinite().all():
        raise InputError(f"direction has shape {list(given.shape)}: give finite numbers [d_model] or [layer, d_model]")
    # Rows = lengths along their own orthonormal axes; the axes are exchanged for random ones.
    left, lengths, _ = torch.linalg.svd(rows, full_matrices=False)
    noise = torch.randn(rows.shape[1], len(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axes, upper = torch.linalg.qr(noise)
    # With signs fixed the axes are uniform; without, they depend on how QR was computed.
    axes = axes * upper.diagonal().sign()
    return ((left * lengths) @ axes.T).float().reshape(given.shape)


@dataclass(frozen=True, eq=False)
class AgainstRandom:
    """What ablating chosen heads does to a measure, beside what random sets of as many heads do.

    Attributes:
        heads: the heads under test.
        sets: the random sets.
        intact: the measure without ablation.
        chosen: the measure with the heads ablated.
        null: with each random set ablated, float64 `[set]`.

    Example:
        >>> import numpy as np
        >>> AgainstRandom = rim.controls.AgainstRandom
        >>> found = AgainstRandom([(0, 1)], [[(0, 0)], [(0, 2)]], intact=0.0, chosen=-2.0, null=np.array([-0.5, 0.3]))
        >>> round(found.p_value, 2)
        0.33
    """

    heads: list[Unit]
    sets: list[list[Unit]]
    intact: float
    chosen: float
    null: Any

    @property
    def p_value(self) -> float:
        """Two-sided `(1 + k) / (1 + n)`, where `k` of the `n` random sets move the measure at least as far."""
        as_far = np.abs(self.null - self.intact) >= abs(self.chosen - self.intact)
        return float((1 + as_far.sum()) / (1 + len(self.null)))

    def to_frame(self) -> pd.DataFrame:
        """A row a set: kind ("intact", "chosen" or "random"), heads as layer.head, the measure as estimate."""
        kinds = ["intact", "chosen", *["random"] * len(self.sets)]
        names = [" + ".join(f"{a}.{b}" for a, b in heads) for heads in ([], self.heads, *self.sets)]
        return pd.DataFrame({"kind": kinds, "heads": names, "estimate": [self.intact, self.chosen, *self.null]})

    def plot(self) -> "alt.LayerChart":
        """The measure under random sets as a histogram, with a line at the chosen heads'."""
        from rim_core import charts

        return charts.distribution(
            self.to_frame().query("kind == 'random'"),
            "estimate",
            title="Do the chosen heads matter more than random ones?",
            x_title="measure with the heads ablated",
            description=f"{len(self.null)} random sets from {self.null.min():.3g} to {self.null.max():.3g}; the chosen "
            f"heads (line) {self.chosen:.3g}, intact {self.intact:.3g}, p = {self.p_value:.2g}.",
            reference=self.chosen,
        )


def against_random(
    model: Model,
    heads: Sequence[Unit],
    measure: Callable[[Model], Any],
    *,
    n_sets: int = 20,
    per_layer: bool = True,
    seed: int = 0,
    mode: str = "zero",
    reference: Reference | None = None,
) -> AgainstRandom:
    """Ablate heads, and random sets of as many others, and compare what happens to a measure.

    Args:
        model: a loaded model.
        heads: `(layer, head)` pairs under test, chosen on other prompts than those measured.
        measure: a function of the model, called under each ablation; gives one number.
        n_sets: random sets; the smallest p-value that can be reached is `1 / (n_sets + 1)`.
        per_layer: draw as many heads in each layer as `heads` has there, so that depth is no difference.
        seed: of the draw, and of "resample".
        mode: as in `ablate`, but by default "zero", which needs no reference.
        reference: as in `ablate`.

    Raises:
        InputError: as `ablate` and `random_sets`, a measure that is no function of the model (a metric such as
            `RefusalLogOdds()` is none), or one that does not give one finite number.

    Example:
        >>> def refusal(model):
        ...     return rim.refusal_log_odds(model, texts, tokens=[5, 6]).mean()
        >>> found = rim.against_random(model, [(0, 1)], refusal, n_sets=2)
        >>> found.null.shape, found.p_value >= 1 / 3
        ((2,), True)
    """
    try:
        inspect.signature(measure).bind(model)
    except (TypeError, ValueError):
        raise InputError(
            f"against_random: measure must be a function of the model, run under each ablation, such as lambda model: "
            f"rim.refusal_log_odds(model, texts).mean(), not {shown(measure)}"
        ) from None
    heads = units_of(model, heads, "heads")
    sets = random_sets(model, heads, n_sets=n_sets, per_layer=per_layer, seed=seed)

    def measured() -> float:
        return number(measure(model), "against_random: measure's value")

    def ablated(chosen: list[Unit]) -> float:
        with ablate(model, chosen, mode=mode, reference=reference, seed=seed):
            return measured()

    return AgainstRandom(heads, sets, measured(), ablated(heads), np.array([ablated(drawn) for drawn in sets]))
