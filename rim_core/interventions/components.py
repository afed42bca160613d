"""What is patched and ablated: components and their sites, and single heads and neurons as `(layer, index)`."""

from collections import Counter
from typing import Any

from rim_core.checking import listed, one_of, shown, whole
from rim_core.errors import InputError
from rim_core.models.model import Model

# The site that each component writes; a component may be called by either name.
COMPONENTS = {
    "attention": "attn_out",
    "mlp": "mlp_out",
    "heads": "head_z",
    "neurons": "mlp_neurons",
    "resid": "resid_post",
}
Unit = tuple[int, int]


def component_of(name: Any) -> str:
    """A component by its own name or its site's; raises InputError where there is none."""
    by_site = {site: component for component, site in COMPONENTS.items()}
    return by_site.get(one_of(name, [*COMPONENTS, *by_site], "components"), name)


def units_of(model: Model, given: Any, component: str) -> list[Unit]:
    """Heads or neurons as distinct pairs of ints `(layer, index)`, in the order given.

    Raises:
        InputError: no such pairs, one that the model does not have, or one named twice.
    """
    what, pairs = component[:-1], listed(given, component)
    try:
        units = [(whole(layer, what), whole(index, what)) for layer, index in pairs]
    except (TypeError, ValueError, InputError):
        raise InputError(
            f"{component} must be (layer, {what}) pairs of whole numbers, such as [(0, 3)], not {shown(given)}"
        ) from None
    count = model.n_heads if component == "heads" or not units else model.layout.width("mlp_neurons")
    for layer, index in units:
        if not (0 <= layer < model.n_layers and 0 <= index < count):
            raise InputError(
                f"{what} {index} of layer {layer} is out of range: {model.name} has layers 0 to {model.n_layers - 1} "
                f"of {count} {component}"
            )
    if repeated := [unit for unit, times in Counter(units).items() if times > 1]:
        raise InputError(f"{what} {repeated[0]} is named twice")
    return units


def columns_of(model: Model, component: str, unit: Unit) -> slice:
    """Where a head or neuron lies in its site's flat width."""
    width = model.head_dim if component == "heads" else 1
    return slice(unit[1] * width, (unit[1] + 1) * width)
