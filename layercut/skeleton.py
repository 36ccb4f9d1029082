"""The skeleton: a model on the meta device, of which the layers are loaded one at a time and the rest only while it is needed.

How the layers are called is not written down here for any architecture: the model's own forward runs over stand-ins for its
layers, which note what they are called with and hand the state on. The real layers are then called with the same arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from layercut.checkpoint import Checkpoint
from layercut.errors import CheckpointError, LayercutError, RefusedError, first_line
from layercut.loading import check_complete, layers_of, own_code, quiet
from layercut.weights import Weights

STATE = "hidden_states"
"""What layers call the state, where they do not take it by position."""


class Call(NamedTuple):
    """What a layer is called with. The state itself is left out: it stands first, or under its name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool
    """Whether the state is passed by name."""

    def on(self, layer: nn.Module, state: Tensor) -> Any:
        """Call a layer with this state."""
        return layer(*self.args, **self.kwargs, **{STATE: state}) if self.named else layer(state, *self.args, **self.kwargs)


class Recording(NamedTuple):
    """What a forward pass comes to before its layers: the state that enters the first of them, and how each is called."""

    state: Tensor
    calls: list[Call]


class Mark:
    """Stands for what a layer returns beside its state. No layer may be given one: it would need the real thing."""


FORMS = (lambda state: state, lambda state: (state,), lambda state: (state, Mark()), lambda state: (state, Mark(), Mark()))
"""What layers return: the state (since transformers 4.54, mostly), or a tuple that starts with it."""


class StandIn(nn.Module):
    """Takes the place of a layer: notes its call, and hands the state on. Whatever else is asked of it, the layer answers."""

    def __init__(self, layer: nn.Module, script: Script) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: it has weights that must not be loaded
        self.__dict__["script"] = script

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.script.play(self.layer, args, kwargs)


class Script:
    """What happens during one forward pass over stand-ins."""

    def __init__(self, layers: Sequence[nn.Module], form: Any, last: Tensor | None = None) -> None:
        self._layers = list(layers)
        self._form = form
        self._last = last
        self._handed: list[Tensor] = []
        self.state: Tensor | None = None
        self.calls: list[Call] = []

    def play(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a stand-in: checks that it comes in turn with the state of the one before it."""
        if len(self.calls) >= len(self._layers) or self._layers[len(self.calls)] is not layer:
            raise Unreadable("its layers do not run once each, in order")
        named = not args
        state = kwargs.get(STATE) if named else args[0]
        if not isinstance(state, Tensor) or state.ndim != 3:
            raise TypeError(f"layer {len(self.calls)} is given no state of (samples, tokens, hidden)")
        if self._handed and state is not self._handed[-1]:
            raise Unreadable(f"something is done to the state between layers {len(self.calls) - 1} and {len(self.calls)}")
        if self.state is None:
            self.state = state
        rest = {name: value for name, value in kwargs.items() if not named or name != STATE}
        self._check([*args[1:], *rest.values()])
        self.calls.append(Call(args[1:], rest, named))
        done = len(self.calls) == len(self._layers)
        # A tensor of its own, so that it is known again wherever it turns up.
        self._handed.append(self._last if done and self._last is not None else state.view(state.shape))
        return self._form(self._handed[-1])

    def _check(self, values: Any) -> None:
        """Raise when a layer is given something that another layer made: it is not known before that one has run."""
        for value in values.values() if isinstance(values, dict) else values:
            if isinstance(value, Mark) or any(value is state for state in self._handed):
                raise Unreadable(f"layer {len(self.calls)} is given more of what layers before it made than the state")
            if isinstance(value, tuple | list | dict):
                self._check(value)

    def check_all_ran(self) -> None:
        """Raise when the pass ended before the last layer."""
        if len(self.calls) != len(self._layers):
            raise Unreadable(f"{len(self.calls)} of its {len(self._layers)} layers run")


class Unreadable(Exception):
    """A forward pass that stand-ins cannot follow."""


class Skeleton:
    """A model of which everything is on the meta device but what is loaded for a while."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Weights,
        depth: int,
        prefix: str,
        device: torch.device,
        dtype: torch.dtype,
        kind: Any = AutoModel,
    ) -> None:
        """`kind` is the auto class: with the LM head or without. Raises CheckpointError when transformers does not know the model."""
        self.folder = checkpoint.folder
        self.device, self.dtype, self._weights = device, dtype, weights
        self.model = _on_meta(checkpoint, dtype, kind)
        stack = layers_of(self.model, depth, prefix)
        self.layers = list(stack)
        self._path = next(name for name, module in self.model.named_modules() if module is stack).split(".")
        self._names, self._rest = _split(checkpoint, prefix, depth)
        for index, layer in enumerate(self.layers):
            stack[index] = StandIn(layer, Script([], FORMS[0]))
        self._stack = stack
        self._form = 0

    @property
    def rest_size(self) -> int:
        """Bytes of what is not in the layers."""
        return _size(self.model)

    @property
    def layer_size(self) -> int:
        """Bytes of the largest layer."""
        return max(_size(layer) for layer in self.layers)

    @property
    def layer_peak(self) -> int:
        """Bytes of the largest layer while it is loaded: twice its size; four times where it is put together from parts, as experts are."""
        parts = any(len(names) > _count(layer) for names, layer in zip(self._names, self.layers, strict=True))
        return self.layer_size * (4 if parts else 2)

    def activations(self, tokens: int) -> int:
        """Bytes that a layer's own states take for so many tokens, about: what each of its matrices gives, and half as much again."""
        widths = max(sum(part.shape[-2] for part in layer.parameters() if part.ndim > 1) for layer in self.layers)
        return tokens * widths * self.dtype.itemsize * 3 // 2

    @property
    def hidden(self) -> int:
        """Size of a state."""
        config: Any = self.model.config
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(getattr(config.get_text_config(), "hidden_size", embeddings.weight.shape[-1]))

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Everything but the layers, loaded."""
        self._fill(self.model, self._rest)
        self.model.eval()
        try:
            yield
        finally:
            _unload(self.model)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One layer, loaded."""
        self._fill(self._shell(index), self._names[index])
        layer = self.layers[index].eval()
        try:
            yield layer
        finally:
            _unload(layer)

    def fetch(self, index: int) -> None:
        """Start to read the weights of a layer, if there is one of that number."""
        if index < len(self.layers):
            self._weights.fetch(self._names[index])

    def record(self, ids: Tensor, mask: Tensor | None) -> Recording:
        """Run the model's forward over stand-ins; within `rest`. Raises RefusedError when that cannot tell how its layers are called."""
        script, _ = self._play(ids, mask, None)
        assert script.state is not None
        return Recording(script.state, script.calls)

    def finish(self, ids: Tensor, mask: Tensor | None, last: Tensor) -> Any:
        """What the model makes of the state that leaves its last layer; within `rest`."""
        return self._play(ids, mask, last)[1]

    def output(self, call: Call, layer: nn.Module, state: Tensor) -> Tensor:
        """The state that a layer makes of one."""
        output = call.on(layer, state)
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, Tensor) or output.shape != state.shape:
            message = f"a layer of this model ({type(layer).__name__}) returns no state of the shape that it was given"
            raise RefusedError(message, where=self.folder, hint="it cannot be measured")
        return output

    def _play(self, ids: Tensor, mask: Tensor | None, last: Tensor | None) -> tuple[Script, Any]:
        furthest, reason = (-1, False), ""
        for form in range(self._form, len(FORMS)):
            script = Script(self.layers, FORMS[form], last)
            for stand_in in self._stack:
                stand_in.__dict__["script"] = script
            try:
                with quiet(), torch.inference_mode():
                    output = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
                script.check_all_ran()
            except (torch.OutOfMemoryError, LayercutError):
                raise
            except Exception as error:  # whatever a model does with a return value of another form
                came = len(script.calls), isinstance(error, Unreadable)
                if came > furthest:
                    furthest, reason = came, first_line(error)
                continue
            self._form = form
            return script, output
        message = f"this model cannot be streamed layer by layer: {reason}"
        raise RefusedError(message, where=self.folder, hint="hold it in memory as a whole: give more with --memory")

    def _shell(self, index: int) -> nn.Module:
        """A model that shares everything with the skeleton but its modules: of those it has the way down to one layer only."""
        shell = node = _bare(self.model)
        inner = self.model
        for part in self._path[:-1]:
            inner = inner._modules[part]  # type: ignore[assignment]
            node._modules[part] = node = _bare(inner)
        layers = [layer if number == index else nn.Identity() for number, layer in enumerate(self.layers)]
        node._modules[self._path[-1]] = nn.ModuleList(layers)
        return shell

    def _fill(self, model: nn.Module, names: Sequence[str]) -> None:
        """Load weights into a model on the meta device, as transformers loads them: renamed, fused, cast, buffers computed."""

        class Given(type(self.model)):  # type: ignore[misc]
            """A class whose instances are the model that is there already."""

            def __new__(cls, *args: object, **kwargs: object) -> Any:
                return model

        where = {} if self.device.type == "cpu" else {"device_map": {"": self.device}}
        try:
            with quiet():
                _, found = Given.from_pretrained(
                    None,
                    config=self.model.config,
                    state_dict=self._weights.lazy(names),
                    dtype=self.dtype,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **where,
                )
        except (LayercutError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers and its backends have no common base class
            raise CheckpointError(f"transformers cannot load this model: {first_line(error)}", where=self.folder) from None
        check_complete(found, self.folder)


def _on_meta(checkpoint: Checkpoint, dtype: torch.dtype, kind: Any) -> nn.Module:
    folder = checkpoint.folder
    if checkpoint.config.get("quantization_config") is not None:
        hint = "hold it in memory as a whole: give more with --memory"
        raise RefusedError("a quantised model cannot be streamed layer by layer", where=folder, hint=hint)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config.use_cache = False
            with torch.device("meta"):
                model: nn.Module = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # the same: no common base class
        raise own_code(error, folder) or CheckpointError(
            f"transformers cannot load this model: {first_line(error)}", where=folder
        ) from None
    return model.eval()


def _split(checkpoint: Checkpoint, prefix: str, depth: int) -> tuple[list[list[str]], list[str]]:
    """Names of the tensors of every layer, and of what is in none; layers behind the last one (for other tokens than the next) left out."""
    layers: list[list[str]] = [[] for _ in range(depth)]
    rest: list[str] = []
    for name in checkpoint.tensors:
        number, dot, _ = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not dot or not number.isdecimal():
            rest.append(name)
        elif int(number) < depth:
            layers[int(number)].append(name)
    return layers, rest


def _bare(module: nn.Module) -> nn.Module:
    """A module that shares everything but submodules, parameters and buffers."""
    bare = copy.copy(module)
    bare._modules, bare._parameters, bare._buffers = {}, {}, {}
    bare.__dict__["all_tied_weights_keys"] = {}
    bare.__dict__["_is_hf_initialized"] = True  # nothing of its own is left to initialise
    return bare


def _unload(module: nn.Module) -> None:
    """Forget the weights of a module, and that it was ever loaded."""
    module.to("meta")
    for part in module.modules():
        part.__dict__.pop("_is_hf_initialized", None)


def _size(module: nn.Module) -> int:
    return sum(part.numel() * part.element_size() for parts in (module.parameters(), module.buffers()) for part in parts)


def _count(module: nn.Module) -> int:
    return sum(1 for parts in (module.parameters(), module.buffers()) for _ in parts)
