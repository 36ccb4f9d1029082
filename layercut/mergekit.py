"""A mergekit (or bakllama) file as data for a recipe. Takes what moves layers; what blends tensors is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from layercut.dialect import Place, Reader, bound, is_normalised, number, shown
from layercut.errors import did_you_mean
from layercut.yamltext import Key, YamlText

OWN_KEYS = (
    "model", "models", "slices", "merge_method", "depth", "steps", "calibration", "metric", "metrics", "output", "evaluate", "upload",
    "stack", "architecture", "allow", "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source", "chat_template",
)  # fmt: skip
"""Top-level keys of a recipe. Those that mergekit does not know pass through untouched."""
LAYOUTS = ("slices", "models", "modules", "layer_slices")
"""Keys that say what the layers are: a file has one of them. `models` only as a list; as a mapping it is the table of aliases."""
OPTIONAL = (*LAYOUTS, "base_model", "dtype", "out_dtype", "parameters", "tokenizer_source", "tokenizer", "chat_template")
"""Keys that mergekit takes for absent when they are null."""
EXPERTS = ("a mixture-of-experts file makes routers and experts, and layercut only moves layers", "use mergekit-moe for it")
GENOME = ("an evolution file searches for blending weights, and layercut only moves layers", "use mergekit-evolve for it")
FOREIGN = {"experts": EXPERTS, "gate_mode": EXPERTS, "genome": GENOME}
BLENDING = (
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs",
    "breadcrumbs_ties", "della", "della_linear", "model_stock", "nearswap", "arcee_fusion", "sce", "ram",
)  # fmt: skip
# The names that mergekit gives the text layers, by hand or from the names of the tensors.
TEXT_MODULE = re.compile(r"default|text_decoder|(?:.*\.)?language_model(?:\.layers)?")
SOURCE = ("model", "layer_range", "parameters")
UNUSED = ("base_model", "residual_weight")
"""Keys of a slice that mean nothing where nothing is blended."""


class Translation(NamedTuple):
    """A mergekit file in the words of a recipe."""

    data: dict[str, Any]
    """For `Recipe.model_validate`."""
    notes: tuple[str, ...]
    """Warnings, one line each, with file, line and column."""
    moved: Mapping[Place, Place] = {}
    """Where the values stood in the text that stand elsewhere in `data`; the longest prefix of a path counts."""

    def origin(self, path: Sequence[Key]) -> Place:
        """The place in the text of a place in `data`, for `YamlText.where`."""
        for stop in range(len(path), 0, -1):
            if tuple(path[:stop]) in self.moved:
                return (*self.moved[tuple(path[:stop])], *path[stop:])
        return tuple(path)


def recognised(data: Any) -> bool:
    """Whether the data of a YAML text is a mergekit file: by `merge_method`, or by what only mergekit writes."""
    if not isinstance(data, dict):
        return False
    if any(key in data for key in ("merge_method", "modules", "layer_slices", *FOREIGN)) or isinstance(data.get("models"), list):
        return True
    slices = [entry for entry in _listed(data.get("slices")) if isinstance(entry, dict)]
    sources = [source for entry in slices for source in _listed(entry.get("sources")) if isinstance(source, dict)]
    own = not any(key in entry for entry in slices for key in UNUSED) and not any(
        isinstance(source.get("model"), dict) for source in sources
    )
    return bool(slices) and (not own or "tokenizer" in data)


def translate(text: YamlText) -> Translation:
    """Read a mergekit file by mergekit's rules: unknown keys and later duplicates are noted, not refused.

    Raises RecipeError with file, line and column for what does not move layers: blending, LoRA adapters, a changed vocabulary.
    Faults that a recipe of layercut's own can have too are left for `Recipe` to find.
    """
    return _File(text).translation()


class _Stack(Reader):
    """The slices of a file."""

    linear = False
    shared: tuple[Any, ...] = ()
    """Parameters of the module and of the file, the nearer first."""

    def __init__(self, text: YamlText) -> None:
        super().__init__(text)
        self.moved: dict[Place, Place] = {}
        self.left_out: list[Any] = []
        """Models of weight 0."""

    def parameters(self, value: Any, path: Place) -> Any:
        """`{scale: …}`, or None when nothing is left. Other parameters are noted."""
        if not isinstance(value, dict):
            return value
        for name in value:
            if name == "scale" and self.linear:
                self.note("parameter 'scale' is ignored: merge_method 'linear' has none", *path, name, hint="write passthrough to scale")
            elif name != "scale" and not (self.linear and name in ("weight", "normalize")):
                self.note(f"parameter '{name}' is ignored: nothing is blended", *path, name, hint=did_you_mean(name, ["scale"]))
        scale = None if self.linear else value.get("scale")
        return None if scale is None or scale == [] else {"scale": self.setting(scale, (*path, "scale"))}

    def stack(self, holder: dict[str, Any], path: Place) -> Any:
        """Slices of a file, or of one of its modules."""
        if isinstance(holder.get("models"), list):
            return [{"sources": [self._single(self._models(holder["models"], (*path, "models")), (*path, "models"), (), 0)]}]
        if path:
            self.moved["slices",] = (*path, "slices")
        slices = holder.get("slices")
        if not isinstance(slices, list):
            return slices
        return [self._slice(entry, (*path, "slices", at), at) for at, entry in enumerate(slices)]

    def _models(self, entries: list[Any], path: Place) -> list[tuple[Any, Place]]:
        """The entries of `models` as sources of one slice of all layers."""
        self.moved |= {("slices",): path, ("slices", 0): path}
        for at, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise self.error("an entry of 'models' is a mapping with 'model'", *path, at)
            if "layer_range" in entry:
                hint = "write slices: [{sources: [{model, layer_range}]}]"
                raise self.error("'models' takes whole models, without 'layer_range'", *path, at, "layer_range", key=True, hint=hint)
        base = self.data.get("base_model")
        if self.linear and base is not None:
            listed = [self.reference(entry.get("model"), (*path, at, "model")) for at, entry in enumerate(entries)]
            if self.reference(base, ("base_model",)) not in listed:
                raise self.error("linear blends 'base_model' with 'models'", "base_model", hint="leave it out, or list it in 'models' too")
        return [({"layer_range": [0, "end"], **entry}, (*path, at)) for at, entry in enumerate(entries)]

    def _slice(self, entry: Any, path: Place, at: int) -> Any:
        if not isinstance(entry, dict):
            return entry
        for key in entry:
            if key in UNUSED:
                self.note(f"'{key}' of a slice is ignored: nothing is blended", *path, key)
        needed = () if "layer_range" in entry else ("sources", "layer_range")
        self.check_keys(entry, path, ("sources", *SOURCE, *UNUSED), needed if "sources" not in entry else ())
        if "sources" not in entry:
            return self._source(entry, path)
        kept = {key: entry[key] for key in ("model", "layer_range", "sources") if key in entry}
        parameters = self.parameters(entry.get("parameters"), (*path, "parameters"))
        if isinstance(entry["sources"], list) and entry["sources"]:
            sources = [(source, (*path, "sources", number)) for number, source in enumerate(entry["sources"])]
            kept["sources"] = [self._single(sources, (*path, "sources"), (entry.get("parameters"),), at)]
        return kept if parameters is None else {**kept, "parameters": parameters}

    def _single(self, sources: list[tuple[Any, Place]], path: Place, nearer: tuple[Any, ...], at: int) -> Any:
        """The one source of a slice, given with their places. A linear slice may have others that weigh nothing."""
        kept = [pair for pair in sources if not self.linear or self._weighs(*pair, (*nearer, *self.shared))]
        if not kept:
            raise self.error("every source has weight 0" if sources else "'models' is empty", *path)
        if len(kept) > 1 and self.linear:
            hint = "use mergekit-yaml for it, or give all but one the weight 0"
            raise self.error(f"merge_method 'linear' blends {len(kept)} sources here, and layercut only moves layers", *path, hint=hint)
        if len(kept) > 1:
            what = "one model in 'models'" if path[-1] == "models" else "exactly one source a slice"
            raise self.error(f"passthrough takes {what}, found {len(kept)}", *path, hint="give each a slice of its own")
        for source, place in sources:
            if place != kept[0][1]:
                model = self.reference(source.get("model") if isinstance(source, dict) else None, (*place, "model"))
                self.note(f"a source of weight 0 is left out, {shown(model)}", *place, key=False)
                self.left_out.append(model)
        source, place = kept[0]
        if place != ("slices", at, "sources", 0):
            self.moved["slices", at, "sources", 0] = place
        if isinstance(source, dict):
            self.check_keys(source, place, SOURCE, ("model", "layer_range"))
        return self._source(source, place)

    def _source(self, source: Any, path: Place) -> Any:
        """`{model, layer_range, parameters}` in one spelling."""
        if not isinstance(source, dict):
            return source
        kept = {}
        if source.get("model") is not None:
            kept["model"] = self.reference(source["model"], (*path, "model"))
        if "layer_range" in source:
            bounds = source["layer_range"]
            kept["layer_range"] = [bound(value) for value in bounds] if isinstance(bounds, list) else bounds
        parameters = self.parameters(source.get("parameters"), (*path, "parameters"))
        return kept if parameters is None else {**kept, "parameters": parameters}

    def _weighs(self, source: Any, path: Place, above: tuple[Any, ...]) -> bool:
        """Whether a source of a linear slice counts. Raises RecipeError when it counts for some of its layers or tensors only."""
        place = (*path, "parameters", "weight")
        weights = self.weights((source.get("parameters") if isinstance(source, dict) else None, *above), place)
        if not any(weights):
            return False
        if not (all(weight > 0 for weight in weights) or all(weight < 0 for weight in weights)):
            raise self.error("the weight is 0 or changes its sign for some layers or tensors", *place, hint="use mergekit-yaml for it")
        if not is_normalised(above) and any(weight != 1 for weight in weights):
            hint = "write merge_method: passthrough and parameters: {scale: …}"
            raise self.error("with 'normalize: false' the weight scales the layers", *place, hint=hint)
        return True

    def bakllama(self, entries: Any) -> Any:
        """Slices of a bakllama file: `layer_slices: [{model, start, end, scale}]`, where `scale` is for `down_proj`."""
        self.moved["slices",] = ("layer_slices",)
        if not isinstance(entries, list):
            return entries
        slices = [self._layers(entry, at) for at, entry in enumerate(entries)]
        for key, end, which in (("embedding_source", 0, "first"), ("lm_head_source", -1, "last")):
            named = self.data.get(key)
            if slices and named is not None and self.reference(named, (key,)) != slices[end]["model"]:
                hint = "layercut takes it from there"
                raise self.error(f"'{key}' is not the model of the {which} slice, {shown(slices[end]['model'])}", key, hint=hint)
        return slices

    def _layers(self, entry: Any, at: int) -> dict[str, Any]:
        path, needed = ("layer_slices", at), ("model", "start", "end")
        if not isinstance(entry, dict):
            raise self.error("an entry of 'layer_slices' is a mapping with model, start and end", *path)
        self.check_keys(entry, path, (*needed, "scale"), needed)
        for key in needed:
            if entry.get(key) is None:
                raise self.error(f"'{key}' is missing", *path)
        made = {"model": self.reference(entry["model"], (*path, "model")), "layer_range": [bound(entry["start"]), bound(entry["end"])]}
        self.moved |= {("slices", at, "layer_range"): (*path, "start"), ("slices", at, "parameters"): (*path, "scale")}
        if entry.get("scale") is not None:
            made["parameters"] = {"scale": [{"filter": "down_proj", "value": number(entry["scale"])}]}
        return made


class _File(_Stack):
    """A whole file."""

    def translation(self) -> Translation:
        for key, (message, hint) in FOREIGN.items():
            if key in self.data:
                raise self.error(message, key, key=True, hint=hint)
        found = {key: self.data[key] for key in LAYOUTS if self.data.get(key) is not None}
        layouts = [key for key, value in found.items() if key != "models" or isinstance(value, list)]
        if len(layouts) > 1:
            hint = f"a file has one of {', '.join(LAYOUTS)}"
            raise self.error(f"'{layouts[0]}' and '{layouts[1]}' in one file", layouts[1], key=True, hint=hint)
        layout = layouts[0] if layouts else None
        self._note_duplicates()
        self.linear = self._method(layout) == "linear"
        made: dict[str, Any] = {}
        for key, value in self.data.items():
            made |= self._entry(key, value, layout)
        if made.get("tokenizer_source") == "union" and self.left_out:
            place = self.moved.get(("tokenizer_source",), ("tokenizer_source",))
            self.note("the union is that of the models that are left: those of weight 0 are left out", *place, key=False)
        return Translation({**made, "merge_method": "passthrough"}, tuple(dict.fromkeys(self.notes)), self.moved)

    def _method(self, layout: str | None) -> str:
        """The merge method: passthrough, or linear, which is a copy where only one source weighs anything."""
        if "merge_method" not in self.data:
            if layout != "layer_slices":
                self.note("no 'merge_method': read as passthrough")
            return "passthrough"
        method = self.data["merge_method"]
        if method == "passthrough" or (method == "linear" and layout in ("slices", "models", "modules")):
            return str(method)
        if method in BLENDING:
            message = f"merge_method '{method}' blends the tensors of models, and layercut only moves layers"
            raise self.error(message, "merge_method", hint="use mergekit-yaml for it")
        hint = did_you_mean(method.strip().lower(), ("passthrough", *BLENDING)) if isinstance(method, str) else None
        message = "'merge_method' is empty" if method is None else f"unknown merge_method {shown(method)}"
        raise self.error(message, "merge_method", hint=hint or "layers are moved by 'passthrough'")

    def _note_duplicates(self) -> None:
        for where, key in self.text.duplicates:
            # Recipes with many constants hang their anchors on one unknown key that stands again and again; it is ignored anyway.
            if key not in self.data or key in (*OWN_KEYS, *OPTIONAL):
                message = self.error(f"key '{key}' stands twice in one mapping, the last one counts").message
                self.notes.append(f"{where}: {message}")

    def _entry(self, key: str, value: Any, layout: str | None) -> dict[str, Any]:
        """What a top-level key becomes."""
        if (
            key == "merge_method"
            or (value is None and key in OPTIONAL)
            or (key, value) in (("out_dtype", "same"), ("chat_template", "auto"))
        ):
            return {}
        if key == layout:
            return self._layout(layout)
        if key == "parameters":
            parameters = self.parameters(value, (key,))
            return {} if parameters is None else {key: parameters}
        if key in ("dtype", "out_dtype"):
            return {key: self.dtype(value, key)}
        if key in ("model", "base_model"):
            return {key: self.reference(value, (key,))}
        if key == "tokenizer_source":
            return {key: self._tokenizer_source(value, key)}
        if key == "tokenizer":
            return self._tokenizer(value)
        if key in OWN_KEYS:
            return {key: value}
        if key == "name":
            self.note("'name' is ignored: it is for several recipes in one file", key)
        elif layout != "layer_slices" or key not in ("embedding_source", "lm_head_source"):
            absent = ("slices", "models", "modules") if layout is None and "model" not in self.data else ()
            self.unknown(key, (), (*OWN_KEYS, "modules", "tokenizer"), absent)
        return {}

    def _layout(self, layout: str) -> dict[str, Any]:
        if layout == "layer_slices":
            return {"slices": self.bakllama(self.data[layout])}
        if layout == "modules":
            return self._modules(self.data[layout])
        self.shared = (self.data.get("parameters"),)
        return {"slices": self.stack(self.data, ())}

    def _modules(self, modules: Any) -> dict[str, Any]:
        """The slices of the text layers; every other module must be a copy of the donor's."""
        names = [name for name in modules if TEXT_MODULE.fullmatch(name)] if isinstance(modules, dict) else []
        if len(names) != 1 or not isinstance(modules[names[0]], dict):
            hint = "name it text_decoder (or default, or language_model)"
            raise self.error("'modules' is a mapping in which one module has the text layers", "modules", key=True, hint=hint)
        module, path, others = modules[names[0]], ("modules", names[0]), [name for name in modules if name != names[0]]
        self.check_keys(module, path, ("slices", "models", "parameters"), ("slices", "models"))
        if (module.get("slices") is None) == (module.get("models") is None):
            raise self.error("a module takes either 'slices' or 'models'", *path)
        if _scales(self.data) and (others or _scales(module)):
            wider = f"is for '{others[0]}' too" if others else f"stands beside that of '{names[0]}'"
            raise self.error(f"this scale {wider}", "parameters", "scale", hint=f"write it below {'.'.join(path)} only")
        self.shared = (module.get("parameters"), self.data.get("parameters"))
        made = {"slices": self.stack(module, path)}
        parameters = self.parameters(module.get("parameters"), (*path, "parameters"))
        if parameters is not None:
            self.moved["parameters",] = (*path, "parameters")
            made["parameters"] = parameters
        for other in others:
            self._copied(other, modules[other], self._donor(made["slices"]))
        return made

    def _donor(self, slices: Any) -> Any:
        """The model that gives what is not a layer."""
        if self.data.get("base_model") is not None:
            return self.reference(self.data["base_model"], ("base_model",))
        first = _listed(slices)[:1]
        if first and isinstance(first[0], dict):
            first = _listed(first[0].get("sources"))[:1] or first
        return first[0].get("model") if first and isinstance(first[0], dict) else None

    def _copied(self, name: str, module: Any, donor: Any) -> None:
        path = ("modules", name)
        entries = _listed(module.get("models")) if isinstance(module, dict) and module.get("slices") is None else []
        if len(entries) != 1 or not isinstance(entries[0], dict):
            message = f"layercut cuts the text layers only, and '{name}' is not copied whole"
            raise self.error(message, *path, hint="write models: [{model: …}] for it")
        if _scales(module) or _scales(entries[0]):
            raise self.error(f"layercut scales the text layers only, not '{name}'", *path)
        found = self.reference(entries[0].get("model"), (*path, "models", 0, "model"))
        if found != donor:
            message = f"'{name}' is that of {shown(found)}, but all that is not a text layer comes from {shown(donor)}"
            raise self.error(message, *path, "models", 0, "model", hint="'base_model' says where it comes from")

    def _tokenizer_source(self, value: Any, *path: Key) -> Any:
        # mergekit's spelling until 2024 was model:ORG/NAME.
        value = value.removeprefix("model:") if isinstance(value, str) else value
        return value if value in ("union", "base") else self.reference(value, path)

    def _tokenizer(self, value: Any) -> dict[str, Any]:
        if self.data.get("tokenizer_source") is not None:
            raise self.error("'tokenizer_source' and 'tokenizer' in one file", "tokenizer", key=True, hint="leave one of them out")
        if not isinstance(value, dict):
            raise self.error(
                "'tokenizer' is a mapping such as {source: base}", "tokenizer", hint="for a model alone write tokenizer_source"
            )
        for key, tool in (("tokens", "mergekit-yaml"), ("pad_to_multiple_of", "transformers' resize_token_embeddings")):
            if value.get(key):
                message = f"not a layer operation: tokenizer.{key} changes the vocabulary"
                raise self.error(message, "tokenizer", key, key=True, hint=f"use {tool} for it")
        self.check_keys(value, ("tokenizer",), ("source", "tokens", "pad_to_multiple_of"))
        self.moved["tokenizer_source",] = ("tokenizer", "source")
        source = value.get("source")
        return {"tokenizer_source": self._tokenizer_source("union" if source is None else source, "tokenizer", "source")}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _scales(holder: dict[str, Any]) -> bool:
    parameters = holder.get("parameters")
    return isinstance(parameters, dict) and parameters.get("scale") not in (None, [])
