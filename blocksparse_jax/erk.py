"""ERK and ER: the Erdos-Renyi budgets, which make large layers sparser than small ones.

A layer's density is `eps * sum(shape) / prod(shape)`. eps is solved so that the total fits; layers
above 1 become dense, and eps is solved again.
"""

import math
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]
"""Layer name -> parameter shape."""


def erk_densities(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: the formula on whole kernel shapes; of stacked kernels, on that of one.

    Args:
      shapes: layer name -> parameter shape.
      density: of all layers together, in (0, 1].

    Returns:
      Layer name -> density in (0, 1].

    Example:
      >>> densities = erk_densities({"a": (3, 3, 8, 8), "b": (3, 3, 64, 64)}, 0.2)
      >>> {name: round(d, 2) for name, d in densities.items()}
      {'a': 1.0, 'b': 0.19}

    Reference: Evci et al., "RigL", ICML 2020.
    """
    return _erdos_renyi({name: shape[-4:] for name, shape in shapes.items()}, shapes, density)


def er_densities(shapes: Shapes, density: float) -> dict[str, float]:
    """Erdos-Renyi: the formula on `(cin, cout)`.

    Args:
      shapes: layer name -> parameter shape.
      density: of all layers together, in (0, 1].

    Returns:
      Layer name -> density in (0, 1].

    Example:
      >>> densities = er_densities({"a": (1, 1, 8, 8), "b": (3, 3, 8, 8)}, 0.1)
      >>> densities["a"] == densities["b"]
      True

    Reference: Mocanu et al., "SET", 2018.
    """
    return _erdos_renyi({name: shape[-2:] for name, shape in shapes.items()}, shapes, density)


def _erdos_renyi(sides: Shapes, shapes: Shapes, density: float) -> dict[str, float]:
    """The densities with `sides` in the place of the shapes of the formula."""
    raw = {name: sum(side) / math.prod(side) for name, side in sides.items()}
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    target = density * sum(size.values())
    dense = set[str]()
    while True:
        rest = [name for name in shapes if name not in dense]
        if not rest:
            return dict.fromkeys(shapes, 1.0)
        room = target - sum(size[name] for name in dense)
        eps = room / sum(raw[name] * size[name] for name in rest)
        full = {name for name in rest if eps * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense |= full
