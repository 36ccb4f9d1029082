"""Metrics that each token has by itself: they follow from the inner products of its boundary states."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from layercut.metric import Inner, Tensor, TokenMetric
from layercut.tokens import Token


class Angular(TokenMetric):
    """Angular distance, `(1/pi) arccos(x_i . x_j / (|x_i| |x_j|))`, by default of the last token.

    Range 0 (same direction) to 1 (opposite). Small means that the layers between i and j turn the state little, so they can
    go. Gromov et al., arXiv 2403.17887, eq. 6-7: last token, mean over samples. In float64 the rounding floor near 0 is
    about 5e-9.

    Unchanged by the length of either state, and by one rotation of both; a distance (triangle inequality).

    Other tools: short-transformers takes arccos in the dtype of the model (0.0075 for 0.0032 in bf16), counts pads, and picks
    blocks from the row of another size; PruneMe quantises to 4 bits, takes the metric in bf16, and scores the last block
    after the final norm; ShortGPT's repository does not clamp and turns NaN into 0.5.
    """

    name: Literal["angular"] = "angular"

    def distances(self, inner: Inner) -> Tensor:
        return inner.cosines.arccos().div_(math.pi)


class Cosine(TokenMetric):
    """Cosine distance, `1 - x_i . x_j / (|x_i| |x_j|)`, by default the mean over all tokens.

    Range 0 (same direction) to 2 (opposite). Between neighbours, i and i + 1, it is the Block Influence (BI) of layer i:
    ShortGPT, arXiv 2403.03853, eq. 1. Small means that the layers between i and j can go.

    Unchanged by the length of either state, and by one rotation of both.

    Other tools: ShortGPT's repository, LLM-Streamline and EvoPress score the last layer after the final norm (0.679 for
    0.378 on SmolLM2-135M); optipfair scores a layer 0.0, the least important, when anything fails, and averages batches, not
    tokens.
    """

    name: Literal["cosine"] = "cosine"
    token: Token = "all"

    def distances(self, inner: Inner) -> Tensor:
        return 1.0 - inner.cosines


class RelativeMagnitude(TokenMetric):
    """Relative magnitude, `|x_j - x_i| / |x_j|`: what the layers i to j - 1 add, in parts of what leaves them; mean over all tokens.

    Range 0 (they add nothing) up, without bound; 1 where x_i is zero. Between neighbours it is the `|f(x)| / |x + f(x)|` of
    weight subcloning, arXiv 2312.09299, as ShortGPT (arXiv 2403.03853) quotes it. Small means that the layers between i and
    j can go. Within a model x_j is the later state, whichever way the seam goes; between two models it is the state that is
    expected. Where x_j is zero the ratio counts as 1, or as 0 when x_i is zero as well.

    Unchanged by one scale and one rotation of both states.

    Other tools: short-transformers takes `|x + f| / |2x + f|`, which is 0.5 for a layer that does nothing and 0.99 for one
    that does everything.
    """

    name: Literal["relative_magnitude"] = "relative_magnitude"
    token: Token = "all"
    directed: ClassVar[bool] = True

    def distances(self, inner: Inner) -> Tensor:
        lengths = inner.squares.sqrt().unsqueeze(1)
        zero = lengths == 0
        found = inner.gaps / lengths.masked_fill(zero, 1.0)
        return found.where(~zero, (inner.gaps > 0).to(found.dtype)) if zero.any() else found


class Euclidean(TokenMetric):
    """Euclidean distance `|x_j - x_i|`, or of unit vectors, `|x_j / |x_j| - x_i / |x_i||`; mean over all tokens.

    Range 0 (equal) up, without bound; of unit vectors 0 to 2. Small means that the layers between i and j can go, but states
    grow with depth, so that the raw distance makes late layers look costly: ReplaceMe, arXiv 2505.02819, figure 5, finds that
    it ranks layers wrongly where the cosine does not. First tokens of a sample may be a hundred times as long as others
    (attention sinks) and then decide the mean: `token: skip-first-1`.

    Unchanged by one rotation and one shift of both states; of unit vectors by the length of either and one rotation of both.

    Other tools: short-transformers sums over the batch instead of averaging, and counts pads.
    """

    name: Literal["euclidean"] = "euclidean"
    token: Token = "all"
    normalised: bool = False
    """Make both states unit vectors first. A state of length zero is at distance 1 from every unit vector."""

    def distances(self, inner: Inner) -> Tensor:
        if not self.normalised:
            return inner.gaps
        found = (2.0 - 2.0 * inner.cosines).clamp_(min=0).sqrt_()
        one = (inner.squares == 0).unsqueeze(2) ^ (inner.squares == 0).unsqueeze(1)
        return found.masked_fill_(one, 1.0) if one.any() else found
