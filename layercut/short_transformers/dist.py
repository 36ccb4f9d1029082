"""Distances by the names of `short_transformers.dist`: for `set_metric`, and functions of two states for those who call them."""

from __future__ import annotations

from dataclasses import dataclass

from layercut.errors import CalibrationError
from layercut.metric import Inner, SampleMetric, Tensor, TokenMetric
from layercut.metrics import Angular, Cosine, Euclidean, Metric, RelativeMagnitude
from layercut.samplewise import Linear
from layercut.tokens import Sample, check_index, positions

__all__ = [
    "Distance",
    "angular_distance_all_tokens",
    "angular_distance_last_token",
    "bi_score",
    "get_angular_distance_ith_token",
    "get_euclidian_dist_ith_token",
    "get_linear_approximation_ith_token",
    "relative_magnitude",
]


@dataclass(frozen=True)
class Distance:
    """A metric of layercut that can be called as a function of two states."""

    metric: Metric

    def __call__(self, input: Tensor, output: Tensor) -> float:
        """The distance of two states of shape (samples, tokens, hidden), in float64; the mean over samples and over tokens that count.

        Raises CalibrationError when they have no such token, or too few samples for the metric.
        """
        label, length = self.metric.label, input.shape[1]
        check_index(self.metric.token, length, label, f"the states have {length}", "use longer texts or another token")
        chosen = list(positions(self.metric.token, Sample(0, [0] * length), label))
        pair = [state[:, chosen].double() for state in (input, output)]
        if isinstance(self.metric, TokenMetric):
            states = pair[0].new_empty((pair[0].shape[:2].numel(), 2, pair[0].shape[-1]))
            states[:, 0], states[:, 1] = (state.flatten(0, 1) for state in pair)
            return float(self.metric.distances(Inner(states @ states.transpose(1, 2)))[:, 0, 1].mean())
        assert isinstance(self.metric, SampleMetric)
        samples, tokens, _ = pair[0].shape
        if samples < self.metric.least_samples:
            message = f"metric {label} compares many samples: it needs {self.metric.least_samples}, and the states have {samples}"
            raise CalibrationError(message, hint="give a larger batch, or hand the metric to set_metric")
        owners = input.new_tensor(range(samples)).long().repeat_interleave(tokens)
        wanted = owners.new_tensor([[0, 1], [0, 0]]).bool()
        return float(self.metric.compare([state.flatten(0, 1) for state in pair], owners, wanted).value[0, 1])


def get_angular_distance_ith_token(i: int) -> Distance:
    """Angular distance of token i of every sample; from the end when i is negative."""
    return Distance(Angular(token=i))


def get_linear_approximation_ith_token(i: int) -> Distance:
    """Share of token i's later state that the best linear map of the earlier one leaves unexplained, on held-out samples."""
    return Distance(Linear(token=i))


def get_euclidian_dist_ith_token(i: int) -> Distance:
    """Euclidean distance of token i of every sample."""
    return Distance(Euclidean(token=i))


angular_distance_last_token = Distance(Angular())
angular_distance_all_tokens = Distance(Angular(token="all"))
bi_score = Distance(Cosine())
relative_magnitude = Distance(RelativeMagnitude())
