"""Folding: a linear map is multiplied into the weight of the module whose output it maps. The bits are the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2

import torch
from torch import Tensor

CHUNK = 1024
"""Columns that are multiplied at once: bounds memory, and shows nowhere in the result."""
SLICES = 3
"""Parts that a matrix is taken apart into; with 19 bits or more each, they hold all that float64 does."""
SMALLEST = -900
"""Exponent of two below which numbers count as nothing: what is left of them would be no normal number."""


def folded(weight: Tensor, fold: Tensor, columns: bool, dtype: torch.dtype) -> Tensor:
    """A weight or bias times a map T, cast to `dtype`: T' W, or W T where the outputs of W are its last dimension.

    `weight` is (d, m), or with `columns` (m, d) or (d); `fold` is (d, d). This is the W_down := T' W_down of ReplaceMe (arXiv 2505.02819,
    appendix A.2). Computed on the CPU in float64 from slices whose products are exact, so that neither the order of summing nor
    threads can be seen. NaN and infinities spread as they do in any product.
    """
    matrix = weight.detach().cpu()
    matrix = matrix.reshape(-1, fold.shape[0]).T if columns else matrix
    left = _slices(fold.detach().cpu().double().T, 1)
    result = torch.empty(matrix.shape, dtype=dtype)
    for first in range(0, matrix.shape[1], CHUNK):
        chunk = matrix[:, first : first + CHUNK]
        result[:, first : first + CHUNK] = _product(left, _slices(chunk.double(), 0))
    return (result.T if columns else result).reshape(weight.shape)


def _product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The product of two matrices from their slices: each partial product is exact, and they are added from the smallest on."""
    total = torch.zeros(left[0].shape[0], right[0].shape[1], dtype=torch.float64)
    for order in reversed(range(SLICES)):
        for one in range(order + 1):
            if one < len(left) and order - one < len(right):
                total += left[one] @ right[order - one]
    return total


def _slices(matrix: Tensor, dim: int) -> list[Tensor]:
    """A float64 matrix as a sum of matrices whose elements are small whole numbers of one unit for each row or column (along `dim`).

    As many bits each as leave all products of one sum exact in the 53 bits of float64 (Ozaki et al., Numerical Algorithms 59, 2012).
    """
    bits = (53 - ceil(log2(max(2, matrix.shape[dim])))) // 2
    found, rest = list[Tensor](), matrix
    while len(found) < SLICES and (not found or rest.any()):
        top = rest.abs().amax(dim, keepdim=True)
        unit = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent.clamp(min=SMALLEST) - bits)
        found.append(torch.round(rest / unit) * unit)
        rest = rest - found[-1]
    return found
