"""What a recipe says of an architecture that layercut does not know: which values of its config, and which tensors, follow the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from layercut.record import Record

Names = tuple[Annotated[str, Field(min_length=1)], ...]


class Architecture(Record):
    """Declares what the general rules cannot know. Values of config.json go by their key, or by their dotted path from the root."""

    depth_keys: Names = ()
    """Keys that hold the number of layers, beside those that layercut knows (`num_hidden_layers`, `n_layer`, ...)."""
    lists: Names = ()
    """Values with one entry (or one letter) a layer: the entries go with their layers."""
    indices: Names = ()
    """Lists of layer indices from 0: they name the same layers at their new indices."""
    numbers: Names = ()
    """Lists of layer numbers from 1."""
    counts: Names = ()
    """Numbers of layers at the beginning of the stack that differ from the others."""
    prefixes: Names = ()
    """Prefixes of tensors whose next number is a layer index too, for example `model.norms.`: they move with the layers."""
    tables: Names = ()
    """Names of tensors outside the layers whose first axis has one part a layer: the parts go with their layers."""
    ignore: Names = ()
    """Values of the config, and prefixes or names of tensors, that do not depend on the layers, whatever length they have."""

    @staticmethod
    def keys(names: Sequence[str], node: Sequence[str]) -> Iterator[str]:
        """The keys that names mean in a config node: plain ones in every node, dotted ones in their own."""
        head = "".join(f"{part}." for part in node)
        for name in names:
            if "." not in name:
                yield name
            elif name.startswith(head) and "." not in name[len(head) :]:
                yield name[len(head) :]

    def names(self, names: Sequence[str], path: Sequence[str]) -> bool:
        """Whether a value of config.json, by its path, is among names."""
        return path[-1] in names or ".".join(path) in names

    def ignores(self, tensor: str) -> bool:
        """Whether a tensor, or a prefix of tensors, is declared not to follow the layers."""
        return any(tensor == name or tensor.startswith(name if name.endswith(".") else f"{name}.") for name in self.ignore)


# What these modules hold ready is not validated: building a validator takes longer than the import.
NOTHING = Architecture.model_construct()
