"""HGRN2's lower bounds of the forget gate, which couple all HGRN2 layers of a model.

    l_i = sum_{j <= i} p_j - p_1,   p = softmax over the n layers of a learned [n, width]

The bounds rise from 0 in the first layer; with equal logits, l_i = i / n. A layer has one bound, also if its HGRN2 is
nested in other mixers, and all HGRN2 cells of a layer share it. Source: Qin et al. 2024 (HGRN2, arXiv 2404.07904),
section 3, after HGRN (arXiv 2311.04823), section 3.3.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from recallax.config import ConfigError
from recallax.layers.base import Statistic
from recallax.layers.dense import parameter
from recallax.layers.hgrn2 import HGRN2Cell
from recallax.models.parameter_paths import LeafPath, ParameterPath, module_at
from recallax.types import Precision


class HGRN2LowerBounds(nnx.Module):
    """The learned lower bounds of a model's HGRN2 layers.

    Args:
        model: The model.
        layer_paths: The paths of all its layers, in order.
        precision: The dtypes of parameters and computation.
    """

    def __init__(self, model: nnx.Module, layer_paths: Sequence[ParameterPath], *, precision: Precision):
        cells_by_layer = [(layer, hgrn2_cells_at(model, layer.path)) for layer in layer_paths]
        self.layer_paths = tuple(layer for layer, cells in cells_by_layer if cells)
        widths = {cell.floor[...].shape[-1] for _, cells in cells_by_layer for cell in cells}
        if len(widths) > 1:
            raise ConfigError(
                f"the HGRN2 layers of a model share their lower bounds; their widths {sorted(widths)} must be equal"
            )
        self.logits = parameter(
            jnp.zeros((len(self.layer_paths), widths.pop()), precision.param), (None, None), weight_decay=False
        )

    def apply(self, model: nnx.Module) -> None:
        """Set the lower bound of every HGRN2 cell of the model.

        Args:
            model: The model; its `floor` statistics are replaced.
        """
        probabilities = jax.nn.softmax(self.logits[...], axis=0)
        bounds = jnp.cumsum(probabilities, axis=0) - probabilities[:1]
        for path in dict.fromkeys(layer.path for layer in self.layer_paths):
            rows = [number for number, layer in enumerate(self.layer_paths) if layer.path == path]
            for cell in hgrn2_cells_at(model, path):
                cell.floor = Statistic(bounds[jnp.array(rows)].reshape(cell.floor[...].shape))


def hgrn2_cells_at(model: nnx.Module, path: LeafPath) -> list[HGRN2Cell]:
    """Return the HGRN2 cells of a layer.

    Args:
        model: The model.
        path: The layer's path.

    Returns:
        The cells, also those nested in other mixers.
    """
    return [node for _, node in nnx.iter_graph(module_at(model, path)) if isinstance(node, HGRN2Cell)]
