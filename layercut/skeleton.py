"""The skeleton: a model on the meta device, of which the layers are loaded one at a time and the rest only while it is needed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from layercut.checkpoint import Checkpoint
from layercut.errors import CheckpointError, LayercutError, RefusedError, first_line
from layercut.loading import check_complete, layers_of, named_class, own_code, quiet
from layercut.staged import Refusal, Staged
from layercut.weights import Weights

WHOLE = "hold it in memory as a whole: give more with --memory"
"""What to do with a model that cannot be streamed."""


class Single(nn.ModuleList):
    """A list of layers of which only one is there: whoever goes through it meets that one alone."""

    def __init__(self, layers: Sequence[nn.Module], index: int) -> None:
        super().__init__(layers)
        self.__dict__["there"] = layers[index]  # no second submodule

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self.__dict__["there"]])


REFUSAL = Refusal("this model cannot be streamed layer by layer", WHOLE)


class Skeleton(Staged):
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
        """`kind` is the auto class: with the LM head or, as `load_backbone` takes it, without.

        Raises CheckpointError when transformers does not know the model.
        """
        model, whole = _on_meta(checkpoint, dtype, kind)
        super().__init__(model, layers_of(model, depth, prefix), checkpoint.folder, REFUSAL)
        self.device, self.dtype, self._weights = device, dtype, weights
        self._path = next(name for name, module in model.named_modules() if module is self._stack).split(".")
        self._names, self._rest = _split(checkpoint, prefix, depth)
        self._ties = self._tied()
        self.rest_size = _size(self.model)
        """Bytes of what is not in the layers. Taken now: what is tied is no longer once it was loaded and forgotten."""
        self._top, self._prefix = model, ""
        """What is loaded as one, and where the model stands in it."""
        self._whole = whole
        self._scattered = False
        """Whether the file keeps weights of layers outside of them."""

    @property
    def rest_peak(self) -> int:
        """Bytes of what is not in the layers while it is loaded: one tensor at a time is there as it is stored, too."""
        stored = self._weights.checkpoint.tensors
        return self.rest_size + max((stored[name].nbytes for name in self._rest), default=0)

    @property
    def logit_size(self) -> int:
        """Bytes of the logits of one token."""
        config: Any = self.model.config
        return int(config.get_text_config().vocab_size) * self.dtype.itemsize

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
        size = getattr(config.get_text_config(), "hidden_size", None)
        if size is None:
            embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
            size = embeddings.weight.shape[-1]
        return int(size)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Everything but the layers, loaded."""
        try:
            missing = self._fill(self._top, self._rest)
            if missing and self._whole is not None:  # some names of the file are understood only by the class that wrote it
                _unload(self.model)
                self._prefix, self._top = f"{self._whole.base_model_prefix}.", _bare(self._whole)
                self._top._modules[self._prefix[:-1]] = self.model
                self._path, self._whole = [self._prefix[:-1], *self._path], None
                missing = self._fill(self._top, self._rest)
            self._check(missing)
            self.model.eval()
            yield
        finally:
            _unload(self.model)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One layer, loaded."""
        layer, names = self.layers[index], self._names[index]
        try:
            missing = self._fill(self._shell(index), [*names, *(self._rest if self._scattered else ())], index)
            if missing and not self._scattered:
                _unload(layer)
                missing = self._fill(self._shell(index), [*names, *self._rest], index)
                self._scattered = not missing
            if any(name in self._ties for name in missing):
                message = f"this model cannot be streamed layer by layer: layer {index} shares weights with another one"
                raise RefusedError(message, where=self.folder, hint=WHOLE)
            self._check(missing)
            yield layer.eval()
        finally:
            _unload(layer)

    def fetch(self, index: int) -> None:
        """Start to read the weights of a layer, if there is one of that number."""
        if index < len(self.layers):
            self._weights.fetch(self._names[index])

    def _tied(self) -> set[str]:
        """Names of weights that stand under another name in the file, if the model says so."""
        return set(getattr(self.model, "all_tied_weights_keys", None) or {})

    def _shell(self, index: int) -> nn.Module:
        """A model that shares everything with the skeleton but its modules: of those it has the way down to one layer only."""
        shell = node = _bare(self._top)
        inner = self._top
        for part in self._path[:-1]:
            inner = inner._modules[part]  # type: ignore[assignment]
            node._modules[part] = node = _bare(inner)
        layers = [layer if number == index else nn.Identity() for number, layer in enumerate(self.layers)]
        node._modules[self._path[-1]] = Single(layers, index)
        return shell

    def _fill(self, model: nn.Module, names: Sequence[str], layer: int | None = None) -> set[str]:
        """Load weights into a model on the meta device, as transformers loads them: renamed, fused, cast, buffers computed.

        For a layer, `model` is its shell. Of `names` those are read that belong there. Returns what was not among them. Raises
        RefusedError when the layer has values that neither its file nor its class gives.
        """
        if layer is not None:
            self._compute_all(model, self.layers[layer], layer)

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
        check_complete({**found, "missing_keys": ()}, self.folder)
        missing = {name.removeprefix(self._prefix) for name in found["missing_keys"]}
        return {name for name in missing if not self._computed(name)}

    def _check(self, missing: set[str]) -> None:
        """Raise CheckpointError when a weight is missing."""
        check_complete({"missing_keys": missing, "mismatched_keys": ()}, self.folder, f"if it loads as a whole, {WHOLE}")

    def _computed(self, name: str) -> bool:
        """Whether the class that config.json names says that a weight need not be in the file: positions that follow a formula."""
        kind = named_class(self.folder)
        patterns = getattr(kind, "_keys_to_ignore_on_load_missing", None) or ()
        return any(re.search(pattern, f"{kind.base_model_prefix}.{name}") for pattern in patterns)

    def _compute_all(self, shell: Any, layer: nn.Module, index: int) -> None:
        """Have values of a layer that are in no file computed by the modules around it, where the layer does not do that itself."""
        initialise = shell._initialize_missing_keys

        def watched(*args: Any, **kwargs: Any) -> None:
            computed = [(name, buffer) for name, buffer in layer.named_buffers() if buffer.is_floating_point() and not buffer.is_meta]
            lost = {name for name, _ in computed} - layer.state_dict(keep_vars=True).keys()
            for name, buffer in computed:
                if name in lost:
                    buffer.fill_(torch.nan)
            initialise(*args, **kwargs)
            around = [shell.get_submodule(".".join(self._path[:depth])) for depth in range(len(self._path))]
            for module in around:
                if any(layer.get_buffer(name).isnan().any() for name in sorted(lost)):
                    with suppress(AttributeError), torch.no_grad():
                        shell._init_weights(module)
            left = next((name for name in sorted(lost) if layer.get_buffer(name).isnan().any()), None)
            if left is not None:
                message = f"this model cannot be streamed layer by layer: {left} of layer {index} is in no file"
                raise RefusedError(message, where=self.folder, hint=WHOLE)

        shell.__dict__["_initialize_missing_keys"] = watched


def _on_meta(checkpoint: Checkpoint, dtype: torch.dtype, kind: Any) -> tuple[nn.Module, Any]:
    """A model of that kind, and the one of the class that config.json names where that is another one around it."""
    folder = checkpoint.folder
    if checkpoint.config.get("quantization_config") is not None:
        raise RefusedError("a quantised model cannot be streamed layer by layer", where=folder, hint=WHOLE)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config.use_cache = False
            with torch.device("meta"):
                model, whole = _built(folder, config, dtype, kind)
    except Exception as error:  # the same: no common base class
        raise own_code(error, folder) or CheckpointError(
            f"transformers cannot load this model: {first_line(error)}", where=folder
        ) from None
    return model.eval(), whole


def _built(folder: Path, config: Any, dtype: torch.dtype, kind: Any) -> tuple[nn.Module, Any]:
    """A model of that kind. The bare model is that of the class which config.json names: it has what the task needs and no more."""
    named = named_class(folder) if kind is AutoModel else None
    if named is not None and isinstance(config, named.config_class or ()):
        whole = named._from_config(config, dtype=dtype)
        bare: nn.Module = whole.base_model
        return bare, whole if bare is not whole else None
    return kind.from_config(config, dtype=dtype, trust_remote_code=False), None


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
