"""Metrics of many tokens together: how much of one cloud of states another one explains. All arithmetic is float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from layercut.metric import SampleMetric, Scores, Tensor

CHUNK = 64
"""Rows of a Gram matrix that are worked on together."""


class Linear(SampleMetric):
    """Linear distance: the share of the later state that the best linear map of the earlier one leaves unexplained, on held-out text.

    `|Y - (a X + X B)|^2 / |Y|^2` over tokens of every fourth sample (the second, the sixth and so on), with X = x_i and Y = x_j
    of unit length and centred by their means over the other samples, on which a and B are fitted: a is the best multiple, and
    B the ridge map of what that leaves, with `ridge` times the mean eigenvalue of the Gram matrix of X. B shrinks to nothing
    where the text does not tell, so that the score falls back to that of the best multiple, and the fit makes sense on fewer
    tokens than dimensions; with many it is the ordinary linear fit. More tokens lower all scores: compare only what was drawn
    alike.

    Range 0 (explained) to about 1 (nothing is explained; more when a fit misleads). Small means that one linear map can
    stand in for the layers between i and j. Within a model x_j is the later state, whichever way the seam goes; between two
    models, also of different hidden sizes (a is 0 then), it is the state that is expected. After the linearity score of "Your
    Transformer is Secretly Linear", arXiv 2405.12250, which is 1 minus the same with any map in place of a and B, on the text
    that it was fitted on. Standard errors are over held-out samples.

    Unchanged by the lengths of the states of any token and by one rotation of both; with `normalised: false`, by a shift and a scale
    of either.

    Other tools: LLM-Microscope, the code of that paper, fits and judges on the same tokens: any two states of at most d tokens are linear.
    short-transformers' "linear approximation" fits one number and takes its logarithm: -29 or minus infinity for a layer that does
    nothing.
    """

    name: Literal["linear"] = "linear"
    ridge: float = Field(default=0.3, ge=1e-6, le=1e6)
    """Weight of the ridge, in mean eigenvalues."""

    directed: ClassVar[bool] = True
    least_samples: ClassVar[int] = 2

    def compare(self, states: Iterable[Tensor], owners: Tensor, wanted: Tensor) -> Scores:
        numbers = owners.unique_consecutive(return_inverse=True)[1]
        held = numbers % 4 == 1
        groups = numbers[held] // 4
        scores = _blank(wanted)
        splits = [_split(state, held) for state in self._vectors(states)]
        for i in wanted.any(1).nonzero()[:, 0].tolist():
            x = splits[i]
            gram = x.fit @ x.fit.T
            power = gram.trace()
            gram.diagonal().add_(self.ridge * power / len(gram) if power > 0 else 1.0)
            # Row t holds the weights with which the fitted tokens predict held-out token t, the same for every Y.
            weights = (x.fit @ x.held.T).cholesky_solve(_lower(gram)).T
            misses = x.held - weights @ x.fit
            for j in wanted[i].nonzero()[:, 0].tolist():
                y = splits[j]
                miss = y.held - weights @ y.fit
                if x.fit.shape == y.fit.shape and power > 0:
                    miss -= (x.fit * y.fit).sum() / power * misses
                ratio = _ratio(miss.square().sum(1), y.held.square().sum(1), groups)
                scores.value[i, j], scores.stderr[i, j] = ratio
        return scores


class Procrustes(SampleMetric):
    """Procrustes distance: the share of one state that no rotation and scale of the other explains, `1 - |X' Y|_*^2`.

    X and Y are the states of the same n tokens, of unit length, centred, and divided by their Frobenius norms; `|.|_*` is the sum of
    the singular values. Range 0 (equal up to shift, scale, rotation and reflection) to 1. Small means that the layers between i and j move
    the cloud of states as a whole, and could be undone by one orthogonal matrix. It is the disparity of SciPy's `procrustes`, the
    squared distance of Ding et al., arXiv 2108.01661, at the best scale. States of different hidden sizes are compared as if
    the smaller ones were padded with zeros. The rotation is fitted and judged on the same tokens: with few tokens for the
    dimensions all distances are small, so compare only what was drawn alike. Standard errors are over samples, the rotation
    taken as given.

    Unchanged by the lengths of the states of any token and by a rotation of either; with `normalised: false`, by a shift and a scale
    of either as well. Symmetric.

    Other tools: Ding et al. do not scale, `2 - 2 |X' Y|_*`; the ranks are the same. No tool for layer pruning has it.
    """

    name: Literal["procrustes"] = "procrustes"
    draw: int = Field(default=256, ge=16, le=16384, strict=True)

    def compare(self, states: Iterable[Tensor], owners: Tensor, wanted: Tensor) -> Scores:
        groups = owners.unique_consecutive(return_inverse=True)[1]
        scores = _blank(wanted)
        clouds = [_turned(_cloud(state)) for state in self._vectors(states)]
        lengths = [_sums(cloud.square().sum(1), groups) for cloud in clouds]
        for i, j in wanted.nonzero().tolist():
            left, values, right = (clouds[i].T @ clouds[j]).svd()
            total = values.sum().clamp(max=1.0)
            parts = _sums(((clouds[i] @ left) * (clouds[j] @ right)).sum(1), groups)
            error = _spread(parts - total * (lengths[i] + lengths[j]) / 2)
            empty = [not lengths[at].any() for at in (i, j)]
            scores.value[i, j] = 1 - total.square() if not any(empty) else float(not all(empty))
            scores.stderr[i, j] = 2 * total * error
        return scores


class CKA(SampleMetric):
    """CKA distance: 1 minus the linear centred kernel alignment of two states, without bias.

    `1 - <K, L> / (|K| |L|)` with K and L the Gram matrices X X' and Y Y' of n tokens of unit length, U-centred: without their diagonal,
    rows and columns of mean zero (Székely and Rizzo, 2014). Range 0 (equal up to shift, scale and rotation) to 1 (unrelated;
    estimates may lie above by chance). Small means that tokens which are near each other in x_i are so in x_j. Linear CKA is
    of Kornblith et al., arXiv 1905.00414; the estimator without bias is that of Nguyen et al., arXiv 2010.15327, eq. 3: the
    plain one comes near 1 for any two states of fewer tokens than dimensions. States may have different hidden sizes.
    Standard errors are over samples, to first order.

    Unchanged by the lengths of the states of any token and by a rotation of either; with `normalised: false`, by a shift and a scale
    of either as well. Symmetric.

    Other tools: ReplaceMe (arXiv 2505.02819, figure 6) finds it weaker than the cosine for choosing blocks. Most implementations
    are of the biased kind.
    """

    name: Literal["cka"] = "cka"

    def compare(self, states: Iterable[Tensor], owners: Tensor, wanted: Tensor) -> Scores:
        numbers = owners.unique_consecutive(return_inverse=True)[1]
        tokens = len(owners)
        clouds = [_cloud(state) for state in self._vectors(states)]
        rows = [cloud @ cloud.sum(0) - cloud.square().sum(1) for cloud in clouds]  # sums of the Gram rows, their diagonals left out
        means = [row / (tokens - 2) - row.sum() / (2 * (tokens - 1) * (tokens - 2)) for row in rows]
        parts = rows[0].new_zeros((int(numbers[-1]) + 1, *wanted.shape))
        for start in range(0, tokens, CHUNK):
            part = slice(start, start + CHUNK)
            block = rows[0].new_empty((len(numbers[part]), len(clouds), tokens))
            for b, (cloud, mean) in enumerate(zip(clouds, means, strict=True)):
                block[:, b] = cloud[part] @ cloud.T - mean[part, None] - mean
                block[:, b].diagonal(offset=start).zero_()
            parts.index_add_(0, numbers[part], block @ block.transpose(1, 2))
        total = parts.sum(0)
        norms = total.diagonal().sqrt()
        scale = norms[:, None] * norms
        none = scale == 0
        scale = scale.masked_fill(none, 1.0)
        same = (total / scale).masked_fill((norms[:, None] == 0) & (norms == 0), 1.0)
        parts = parts / scale
        own = parts.diagonal(dim1=1, dim2=2)
        # A pair of tokens counts in the rows of both, so a sample has twice the part of its own rows.
        error = 2 * _spread(parts - same * (own.unsqueeze(2) + own.unsqueeze(1)) / 2)
        return Scores((1 - same).masked_fill(~wanted, 0.0), error.masked_fill(~wanted | none, 0.0))


class _Split(NamedTuple):
    """The states of one boundary, centred by the mean of those that are fitted."""

    fit: Tensor
    held: Tensor


def _split(state: Tensor, held: Tensor) -> _Split:
    fit = state[~held]
    mean = fit.mean(0)
    return _Split(fit - mean, state[held] - mean)


def _cloud(state: Tensor) -> Tensor:
    """States centred, of Frobenius norm 1 unless they are all equal."""
    state = state - state.mean(0)
    return state / (state.norm() or 1.0)


def _turned(cloud: Tensor) -> Tensor:
    """The cloud in as many dimensions as it has tokens, when it has more: the same inner products between its states."""
    import torch

    return torch.linalg.qr(cloud.T, mode="r")[1].T if cloud.shape[1] > len(cloud) else cloud


def _lower(gram: Tensor) -> Tensor:
    import torch

    return torch.linalg.cholesky(gram)


def _blank(wanted: Tensor) -> Scores:
    import torch

    value, stderr = (torch.zeros(wanted.shape, dtype=torch.float64, device=wanted.device) for _ in range(2))
    return Scores(value, stderr)


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """Sums of the values (n,) of each sample, (samples,)."""
    return values.new_zeros(int(groups[-1]) + 1).index_add_(0, groups, values)


def _spread(parts: Tensor) -> Tensor:
    """Standard error of a sum that each sample has a part in, from how the parts deviate from their share: over the first axis."""
    samples = len(parts)
    return (parts.square().sum(0) * (samples / max(samples - 1, 1))).sqrt() if samples > 1 else parts[0] * 0


def _ratio(above: Tensor, below: Tensor, groups: Tensor) -> tuple[float, float]:
    """Ratio of two sums over tokens, and its standard error with the sample as the unit. Nothing of nothing is 0."""
    over, under = _sums(above, groups), _sums(below, groups)
    total = under.sum()
    if total == 0:
        return float(above.sum() > 0), 0.0
    ratio = over.sum() / total
    return float(ratio), float(_spread(over - ratio * under) / total)
