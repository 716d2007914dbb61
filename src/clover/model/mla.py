"""What blocks compute before their heads, where keys and values come out of a latent, see ``family.Latent``.

The stock module and the one that takes its place hold the same modules for it under the same names.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from clover.model.family import Latent


def read(
    module: Any, latent: Latent, x: Float[Tensor, "batch tokens D"]
) -> tuple[Float[Tensor, "batch tokens q"], Float[Tensor, "batch tokens c"], Float[Tensor, "batch tokens r"]]:
    """What the projection of the queries reads, what that of keys and values reads, and the key beside them."""
    source = x
    for name in latent.queries:
        step = getattr(module, name)
        source = source if step is None else step(source)
    beside = getattr(module, latent.beside)
    both = module.get_submodule(latent.keys)(x)
    inside, key = both.split([both.shape[-1] - beside, beside], -1)
    return source, module.get_submodule(latent.norm)(inside), key


def projections(module: Any, latent: Latent | None) -> list[nn.Linear]:
    """Those to the latents; none in a block without."""
    found = [getattr(module, name) for name in (*latent.queries, latent.keys)] if latent else []
    return [step for step in found if isinstance(step, nn.Linear)]
