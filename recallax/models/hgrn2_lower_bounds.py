"""What layers share: HGRN2's floors, a cumulative softmax over all layers of that kind.

    l_i = sum_{j <= i} p_j - p_1,   p = softmax over the n layers of a learned [n, width]

so the floors rise from 0 in the first layer and start at i / n. A layer has one floor, however deep inside other mixers
its HGRN2 stands, and where it has several they share it. Source: Qin et al. 2024 (HGRN2, arXiv 2404.07904), section 3,
after HGRN (arXiv 2311.04823), section 3.3.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recallax.config import ConfigError
from recallax.layers.base import Statistic
from recallax.layers.dense import parameter
from recallax.layers.hgrn2 import HGRN2Cell
from recallax.models.parameter_paths import LeafPath, ParameterPath
from recallax.types import Precision


class HGRN2LowerBounds(nnx.Module):
    """The learned floors of a model's HGRN2 layers; `layer_paths` are all its layers, in order."""

    def __init__(self, model: nnx.Module, layer_paths: Sequence[ParameterPath], *, precision: Precision):
        found = [(place, hgrn2_cells_at(model, place.path)) for place in layer_paths]
        self.layer_paths = tuple(place for place, cells in found if cells)
        widths = {cell.floor[...].shape[-1] for _, cells in found for cell in cells}
        if len(widths) > 1:
            raise ConfigError(
                f"the HGRN2 layers of a model share their floors; their widths {sorted(widths)} must be equal"
            )
        self.logits = parameter(
            jnp.zeros((len(self.layer_paths), widths.pop()), precision.param), (None, None), weight_decay=False
        )

    def apply(self, model: nnx.Module) -> None:
        """Give every HGRN2 layer of the model, repeated ones included, the floor that its place has."""
        shares = jax.nn.softmax(self.logits[...], axis=0)
        floors = jnp.cumsum(shares, axis=0) - shares[:1]
        for path in dict.fromkeys(place.path for place in self.layer_paths):
            rows = [number for number, place in enumerate(self.layer_paths) if place.path == path]
            for cell in hgrn2_cells_at(model, path):
                cell.floor = Statistic(floors[jnp.array(rows)].reshape(cell.floor[...].shape))


def hgrn2_cells_at(model: nnx.Module, path: LeafPath) -> list[HGRN2Cell]:
    """The HGRN2 cells of the layer at this path."""
    module: Any = model
    for name in path:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, HGRN2Cell)]
