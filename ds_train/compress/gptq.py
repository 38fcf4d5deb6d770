"""GPTQ (arXiv 2210.17323): rounding a matrix so that what it gives for known inputs changes least.

Shapes: O outputs, I inputs, G groups of inputs that share a scale, B inputs of a block, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_train.compress.rounding import Grid

_BLOCK = 128
_DAMP = 0.01
"""Of the mean diagonal, added to the diagonal (the paper's section 3.3)."""


def gptq(weight_OI: Tensor, products_II: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(weights (O, I) that lie on the grid, their scales (O, G)), both in the format of `weight_OI`.

    Inputs are rounded one after the other, and those that are left make up for the error. A group's scale is that of
    its weights when its turn comes. A weight that is zero stays zero: what it would have made up for goes on to those
    after it, as in SparseGPT (arXiv 2301.00774).

    Args:
        products_II: sum over tokens of x x^T for the inputs x that the layer gets.
    """
    exact = weight_OI.float().clone()
    kept_OI = exact != 0
    upper = inverse_factor(exact, products_II)
    inputs = exact.shape[1]
    group, single = grid.group or inputs, Grid(grid.bits)
    scales: list[Tensor] = []
    rounded = torch.empty_like(weight_OI)
    # Whole groups in a block: the errors of earlier ones are made up for before a group's scale is taken.
    size = max(1, _BLOCK // group) * group if grid.group else _BLOCK
    for start in range(0, inputs, size):
        stop = min(start + size, inputs)
        errors_OB = torch.empty_like(exact[:, start:stop])
        for place in range(start, stop):
            if place % group == 0:
                part = slice(place, place + group)
                # In the format that is stored, so that its rounding is made up for, too.
                scales.append(single.scales((exact[:, part] * kept_OI[:, part]).to(weight_OI.dtype)))
            column_O1 = exact[:, place : place + 1]
            rounded[:, place : place + 1] = single.rounded(column_O1, scales[-1]) * kept_OI[:, place : place + 1]
            error_O1 = (column_O1 - rounded[:, place : place + 1].float()) / upper[place, place]
            exact[:, place + 1 : stop] -= error_O1 * upper[place, place + 1 : stop]
            errors_OB[:, place - start : place - start + 1] = error_O1
        exact[:, stop:] -= errors_OB @ upper[start:stop, stop:]
    return rounded, torch.cat(scales, -1)


def inverse_factor(weight_OI: Tensor, products_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped products' inverse, (I, I) fp32. Weights of inputs that are always zero
    become zero in place."""
    products = products_II.double().clone()
    dead = products.diagonal() == 0
    products.diagonal()[dead] = 1.0
    weight_OI[:, dead] = 0.0
    products.diagonal().add_(_DAMP * products.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products))
    return torch.linalg.cholesky(inverse, upper=True).float()
