"""Vets a plan, which may come from a file that anyone wrote: it reads only its sources, and writes only inside its output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from layercut.arithmetic import DTYPES, LONGEST
from layercut.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint, weight_files
from layercut.companions import left_out_reason
from layercut.errors import CheckpointError, OutputError
from layercut.fetching import check_here
from layercut.fits import fault_of
from layercut.header import ITEM_BITS, parse_json, quoted
from layercut.plan import Actions, Band, Gather, Grown, OutputFile, Part, Plan, TensorCopy, TensorMade
from layercut.report import REPORT


def open_sources(plan: Plan) -> dict[str, Checkpoint]:
    """All sources by alias. Raises CheckpointError when one is gone, damaged, not all here, or has another structure than the plan saw."""
    found: dict[str, Checkpoint] = {}
    for alias, source in plan.sources.items():
        found[alias] = open_checkpoint(Path(source.folder), reference=source.reference, revision=source.revision)
        sizes = {name: file.size for name, file in found[alias].files.items()}
        if (found[alias].digest, sizes) != (source.digest, source.files):
            raise CheckpointError("source changed since the plan was made", where=source.folder, hint="plan again")
    check_here(plan)
    return found


def check_plan(plan: Plan, sources: Mapping[str, Checkpoint]) -> None:
    """A plan may come from a file that anyone wrote: it must not read outside the sources, nor write outside the output.

    Raises OutputError, naming what is wrong.
    """
    actions = plan.actions
    _require(plan.donor in sources, f"plan names the donor {quoted(plan.donor)}, which is no source of it")
    for layer in actions.layers:
        _require(layer.span > 0, f"plan lets layer {layer.index} of {quoted(layer.model)} stand for {layer.span} layers")
        last = layer.model, layer.index + layer.span - 1
        for model, index in ((layer.model, layer.index), last, *((share.model, share.index) for share in layer.shares)):
            known = model in sources and 0 <= index < plan.sources[model].depth
            _require(known, f"plan holds layer {index} of {quoted(model)}, which is not there")
    names = [CONFIG, *([] if actions.index is None else [INDEX]), REPORT]
    names += [file.name for file in actions.files] + [companion.name for companion in actions.companions]
    _check_names([*names, *actions.texts])
    for companion in actions.companions:
        carried = dict(sources[companion.model].companions) if companion.model in sources else {}
        _require(companion.name in carried, f"plan copies {quoted(companion.name)}, which is no file of {quoted(companion.model)}")
        if carried[companion.name] != companion.size:
            path = sources[companion.model].folder / companion.name
            raise CheckpointError("changed since the plan was made", where=path, hint="plan again")
    _check_texts(actions)
    homes = _check_files(actions.files, sources)
    _check_maps(plan)
    _require(isinstance(parse_json(actions.config, Path(CONFIG), infinity=True), dict), "plan's config.json is not a JSON object")
    _require(actions.index is not None or len(actions.files) == 1, "plan writes several weight files without an index")
    if actions.index is not None:
        _require(weight_files(actions.index, Path(INDEX)) == homes, f"plan's {INDEX} does not list its tensors")


def _check_texts(actions: Actions) -> None:
    """Texts are files that a checkpoint may carry, so that whoever reads the output takes none for weights; all can be encoded."""
    for name in actions.texts:
        reason = left_out_reason(name)
        _require(reason is None, f"plan writes {quoted(name)} from text, which no checkpoint carries ({reason})")
    for name, text in ((CONFIG, actions.config), (INDEX, actions.index or ""), *actions.texts.items()):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            _require(False, f"plan's {quoted(name)} holds half of a surrogate pair at {error.start}, which is no character")


def _check_maps(plan: Plan) -> None:
    """The maps that go into tensors are here, and are what was fitted. Raises CheckpointError when not."""
    made = [tensor for file in plan.actions.files for tensor in file.tensors if isinstance(tensor, TensorMade)]
    sizes = {one.sha256: one.size for tensor in made for one in tensor.maps}
    for digest, size in sizes.items():
        _require(digest in plan.maps, f"plan does not say where the map {digest} is")
        path = Path(plan.maps[digest])
        fault = fault_of(path, digest, size)
        if fault is not None:
            raise CheckpointError(f"the map that was fitted for this plan {fault}", where=path, hint="plan again")


def _check_files(files: Sequence[OutputFile], sources: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Every tensor stands once and comes from where weights are. Gives the file of every tensor."""
    _require(bool(files), "plan writes no weights")
    homes: dict[str, str] = {}
    for file in files:
        _require(file.name.endswith(".safetensors"), f"plan writes weights to {quoted(file.name)}, which is not a .safetensors file")
        for tensor in file.tensors:
            _require(tensor.name not in homes, f"plan writes tensor {quoted(tensor.name)} twice")
            homes[tensor.name] = file.name
            if isinstance(tensor, TensorMade):
                _check_made(tensor, sources)
            else:
                _check_range(f"tensor {quoted(tensor.name)}", tensor, tensor.shape, sources)
    return homes


def _check_names(names: Sequence[str]) -> None:
    """Relative names that stay inside the folder, each once, none a folder of another."""
    seen: set[str] = set()
    for name in names:
        plain = all(part not in ("", ".", "..") for part in name.split("/")) and "\\" not in name and name.isprintable()
        _require(plain, f"plan writes to {quoted(name)}, which is not a plain name inside the output folder")
        _require(name not in seen, f"plan writes {quoted(name)} twice")
        seen.add(name)
    for name in names:
        above = next((str(folder) for folder in Path(name).parents if str(folder) in seen), None)
        _require(above is None, f"plan writes {quoted(above)} as a file and as a folder")


def _check_made(made: TensorMade, sources: Mapping[str, Checkpoint]) -> None:
    what = f"tensor {quoted(made.name)}"
    plain = made.gather is not None and made.gather.dtype == made.dtype and made.compute is None and not made.factors
    dtypes = () if plain else (made.dtype, *([] if made.compute is None else [made.compute]), *(part.dtype for part in made.parts))
    for dtype in dtypes:
        _require(dtype in DTYPES, f"plan computes {what} in {quoted(dtype)}; arithmetic is for {', '.join(DTYPES)}")
    _require(min(made.shape, default=0) >= 0, f"plan gives {what} the shape {list(made.shape)}")
    if made.gather is not None:
        _check_gather(what, made, made.gather, sources)
    _require(bool(made.parts) or made.gather is not None or not made.factors, f"plan multiplies {what}, which has no parts")
    if made.amend is not None:
        _check_amend(what, made, made.amend)
    for kind, numbers in (("weight", [part.weight for part in made.parts]), ("factor", made.factors)):
        odd = next((number for number in numbers if not math.isfinite(number)), None)
        _require(odd is None, f"plan computes {what} with the {kind} {odd}")
    for part in made.parts:
        _check_range(what, part, made.shape, sources)
    for one in made.maps:
        _require(bool(made.parts), f"plan folds a map into {what}, which has no parts")
        wide = made.shape[-1 if one.columns else 0] if len(made.shape) == 2 or (len(made.shape) == 1 and one.columns) else None
        _require(wide == one.size, f"plan folds a map of size {one.size} into {what} of shape {list(made.shape)}")


def _check_amend(what: str, made: TensorMade, amend: Band | Grown) -> None:
    """The rows are those of a whole tensor; what grows is a short vector beside another one, and nothing else is done to it."""
    elements = math.prod(made.shape)
    if isinstance(amend, Band):
        fits = bool(made.parts) and amend.stop <= amend.row and elements % amend.row == 0 and math.isfinite(amend.by)
    else:
        fits = len(made.parts) == 2 and not made.factors and elements <= LONGEST and math.isfinite(amend.by)
    _require(fits and amend.at == 0 and made.gather is None, f"plan amends {what} in a way that does not fit it")


def _check_gather(what: str, made: TensorMade, gather: Gather, sources: Mapping[str, Checkpoint]) -> None:
    """The strips are weights of sources, and as many bytes as the tensor has."""
    _require(gather.dtype in ITEM_BITS and not made.parts, f"plan gathers {what} in {quoted(gather.dtype)}, or beside other parts")
    for strip in gather.strips:
        source = sources.get(strip.model)
        file = None if source is None else source.files.get(strip.file)
        end = strip.begin + (gather.rows - 1) * strip.stride + strip.width
        inside = file is not None and file.data_start <= strip.begin and 0 < strip.width <= strip.stride and end <= file.size
        _require(inside, f"plan gathers {what} from bytes that are not weights of {quoted(strip.file)}")
    whole = math.prod(made.shape) * ITEM_BITS[gather.dtype] == 8 * gather.rows * gather.width and gather.at == 0
    _require(whole, f"plan gathers {gather.rows} rows of {gather.width} bytes for {what} of shape {list(made.shape)}")


def _check_range(what: str, part: TensorCopy | Part, shape: tuple[int, ...], sources: Mapping[str, Checkpoint]) -> None:
    """The bytes are weights of a source, and as many as the tensor has."""
    source = sources.get(part.model)
    file = None if source is None else source.files.get(part.file)
    verb = "copies" if isinstance(part, TensorCopy) else "reads"
    if file is None:
        raise OutputError(f"plan {verb} {what} from {quoted(part.file)}, which is no weight file of {quoted(part.model)}")
    inside = file.data_start <= part.begin <= part.end <= file.size
    _require(inside, f"plan {verb} {what} from bytes {part.begin} to {part.end}, which are not weights of {quoted(part.file)}")
    _require(part.dtype in ITEM_BITS, f"plan gives {what} the unknown dtype {quoted(part.dtype)}")
    whole = min(shape, default=0) >= 0 and math.prod(shape) * ITEM_BITS[part.dtype] == 8 * (part.end - part.begin)
    _require(whole, f"plan {verb} {part.end - part.begin} bytes for {what}, {part.dtype} of shape {list(shape)}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise OutputError(message, hint="make the plan again with: layercut plan RECIPE -o FILE")
