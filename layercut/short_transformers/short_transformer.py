"""ShortTransformer: a transformers model that measures and prunes its own layers. It stays the model that it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from layercut.errors import CalibrationError, CheckpointError, LayercutError
from layercut.inmemory import cut, layers_in, member_of
from layercut.short_transformers.dist import angular_distance_last_token
from layercut.short_transformers.measuring import measure_blocks, read_samples
from layercut.short_transformers.utils import get_best_pruning_start


class ShortTransformer:
    """What `from_model` and `from_pretrained` add to a causal language model of transformers.

    The model is of its own class as before and of this one: it trains, generates and saves as any other. Nothing is attached to its layers,
    but for the one pass of `analyse_layers`.
    """

    distance: Any
    """What is measured with: a distance of `dist`, or a function of two states."""

    @classmethod
    def from_model(cls, model: Any, distance: Callable[[Any, Any], Any] = angular_distance_last_token) -> Any:
        """Make a loaded model a ShortTransformer, in place. Raises CheckpointError when its layers cannot be found."""
        from transformers import PreTrainedModel

        kind: Any = type(model)
        if not issubclass(kind, PreTrainedModel):
            raise LayercutError(f"from_model takes a model of transformers, not {kind.__name__}")
        member_of(model)
        if not issubclass(kind, ShortTransformer):
            model.__class__ = _short(kind)
        model.distance = distance
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a causal language model as `AutoModelForCausalLM.from_pretrained` does, from safetensors, without code of the checkpoint."""
        from transformers import AutoModelForCausalLM

        for name, safe in (("trust_remote_code", False), ("use_safetensors", True)):
            if kwargs.setdefault(name, safe) not in (safe, None):
                hint = "load the model with transformers and hand it to from_model"
                raise CheckpointError(f"from_pretrained does not take {name}={kwargs[name]}", hint=hint)
        return cls.from_model(AutoModelForCausalLM.from_pretrained(*args, **kwargs))

    @property
    def layer_count(self) -> int:
        """Number of layers now."""
        return len(layers_in(self, member_of(self)))

    def set_metric(self, criterion_callable: Callable[[Any, Any], Any]) -> None:
        """Measure with a distance of `dist`, or with one of your own.

        Your own gets the states that enter and leave a block, (1, tokens, hidden) in float32 on the CPU, and gives one number. It is called
        for every block of every sample; those of `dist` are measured all at once.
        """
        if not callable(criterion_callable):
            raise LayercutError(f"a metric is called with two states, and {type(criterion_callable).__name__} cannot be")
        self.distance = criterion_callable

    def analyse_layers(
        self,
        dataset: Iterable[Any],
        tokenizer: Any = None,
        use_chat_template: bool = False,
        key: str | None = None,
        limit: int = 1,
        max_length: int = 1000,
        batch_size: int = 1,
    ) -> Any:
        """Distances of all blocks on the first `limit` rows of a dataset, as a float64 numpy array of shape (layers, layers).

        `results[n, l]` is the mean distance of the block of n layers that starts at layer l; row 0 and places without a block are 0.
        `key` is the column (by default `text`, or else `content`); with `use_chat_template` it holds messages. Each row is cut to
        `max_length` tokens, rows without text are passed over. `tokenizer` is the model's own by default. `batch_size` changes speed, not
        results. Raises LayercutError with one clear line.
        """
        import numpy

        for name, value in (("limit", limit), ("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise LayercutError(f"{name} is {value}, and must be 1 or more")
        tokenizer = self._own_tokenizer() if tokenizer is None else tokenizer
        samples = read_samples(dataset, tokenizer, key=key, limit=limit, max_length=max_length, chat=use_chat_template)
        rows = measure_blocks(self, samples, self.distance, batch_size)
        results = numpy.zeros((len(rows) + 1, len(rows) + 1))
        for size, row in enumerate(rows, 1):
            results[size, : len(row)] = row
        return results

    def prune(self, start_layer: int, block_size: int) -> Any:
        """Remove the block of `block_size` layers from `start_layer` on, in place; returns the model.

        It runs, generates, saves, and can be measured and pruned again. Raises LayercutError, and changes nothing, when there is no such
        block or the shorter model would compute something else than its layers do.
        """
        cut(self, start_layer, start_layer + block_size)
        return self

    def remove_layers(
        self,
        tokenizer: Any = None,
        block_size: int = 1,
        dataset: Iterable[Any] = (),
        key: str | None = None,
        limit: int = 1,
        batch_size: int = 1,
        max_length: int = 1000,
        use_chat_template: bool = False,
    ) -> Any:
        """Measure, then remove the block of `block_size` layers of least distance, in place; returns the model."""
        if not 1 <= block_size < self.layer_count:
            raise LayercutError(
                f"block_size is {block_size}, and a model of {self.layer_count} layers has blocks of 1 to {self.layer_count - 1}"
            )
        results = self.analyse_layers(dataset, tokenizer, use_chat_template, key, limit, max_length, batch_size)
        return self.prune(get_best_pruning_start(results, block_size), block_size)

    def clear_memory(self) -> None:
        """Does nothing: no pass leaves anything behind."""

    def _own_tokenizer(self) -> Any:
        """The tokenizer that lies where the model was loaded from."""
        from transformers import AutoTokenizer

        model: Any = self
        place = getattr(model.config, "_name_or_path", "")
        try:
            if not place:
                raise OSError("the model was not loaded from anywhere")
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "pass tokenizer=..."
            raise CalibrationError(f"no tokenizer can be loaded: {reason}", where=place or None, hint=hint) from None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the class of transformers, which can be imported; the class here is made again."""
        return _blank, (type(self).__bases__[1],), self.__dict__


@cache
def _short(kind: Any) -> Any:
    """The class of a model that is a ShortTransformer too. It has the name of its own, which saved configs state."""
    return type(kind.__name__, (ShortTransformer, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: Any) -> Any:
    """A model without content, for copies."""
    short = _short(kind)
    return short.__new__(short)
