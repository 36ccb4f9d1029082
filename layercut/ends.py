"""What stands before and behind the layers of a stack: embeddings, final norm and head, and whether head and embeddings are tied."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from layercut.architecture import LayerStack, Member, config_node
from layercut.checkpoint import Checkpoint, Tensor
from layercut.errors import RefusedError
from layercut.plan import Edit
from layercut.towers import TEXT, role_of

# Words in the name of a tensor outside the stack that put it behind the last layer: final norm and heads.
BEHIND = re.compile(
    r"(^|[._])(norm|norm_?f|ln_?f|final_\w*norm|layer_?norm|lm_head|head|embed_out|score|classifier|pooler|project_out|cls|output)([._]|$)"
)
# Multi-token prediction in a namespace of its own: it reads the last boundary state.
MTP = re.compile(r"(^|\.)mtp[._]")
EMBEDDING = re.compile(r"(^|[._])(embeddings|embed(?!_out)|wte|wpe)[._]")
# The token embeddings and the head that may be tied to them.
TOKENS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|embeddings?)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
TIE = "tie_word_embeddings"


class Outside(NamedTuple):
    """A tensor outside the layers: the name it gets, and whose it is."""

    name: str
    tensor: Tensor
    model: str


class Ends(NamedTuple):
    """Tensors before and behind the layers, and what the config must say about them."""

    before: tuple[Outside, ...]
    behind: tuple[Outside, ...]
    edits: tuple[Edit, ...] = ()
    notes: tuple[str, ...] = ()


def outside(checkpoint: Checkpoint, stack: LayerStack) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors before and behind the layers of one checkpoint, each in the order of its bytes."""
    found = [tensor for tensor in checkpoint.tensors.values() if stack.place(tensor.name) is None]
    behind = [tensor for tensor in found if _is_behind(tensor.name, stack)]
    return tuple(tensor for tensor in found if tensor not in behind), tuple(behind)


def _is_behind(name: str, stack: LayerStack) -> bool:
    """Whether a tensor outside the layers belongs to what follows them: not to another tower, nor to the encoder before a decoder."""
    if MTP.search(name):
        return True
    role = role_of(name.split("."))
    if stack.name not in (TEXT, role.side) and role.side is not None and role.tower == TEXT:
        return stack.name == "encoder"
    other = role.tower != TEXT and stack.name in (TEXT, "encoder", "decoder")
    return not other and BEHIND.search(name) is not None and EMBEDDING.search(name) is None


def find_ends(members: Mapping[str, Member], donor: str, first: str, last: str) -> Ends:
    """What stands before the stack comes from the model of its first layer, what stands behind it from the model of its last.

    A head that is tied to the embeddings is not in the file. Where the two models differ in that, the head that the last
    model uses is written out, and the config, which is that of `donor`, says that it is not tied. Raises RefusedError when
    that config describes tensors of other shapes.
    """
    before = tuple(Outside(tensor.name, tensor, first) for tensor in outside(*members[first])[0])
    behind = tuple(Outside(tensor.name, tensor, last) for tensor in outside(*members[last])[1])
    heads = {alias: _only(members[alias].checkpoint, HEAD) for alias in (first, last)}
    own, name = _only(members[last].checkpoint, TOKENS), heads[first]
    if first != last and heads[last] is None and name is not None and own is not None:
        behind = (*behind, Outside(name.name, own, last))
    written = any(HEAD.search(part.name) for part in behind)
    tied = is_tied(members[last]) and (first == last or not written)
    _check_shapes(members[donor].checkpoint, donor, (*before, *behind))
    notes = (f"head and embeddings stay tied: both come from '{first}'",) if tied and first != last else ()
    if tied == is_tied(members[donor]):
        return Ends(before, behind, (), notes)
    of_whom = "other embeddings" if first == last else f"the embeddings of '{first}'"
    reason = f"the head of '{last}' is tied to the embeddings" if tied else f"the head of '{last}' is not {of_whom}"
    return Ends(before, behind, (_tie(members[donor], tied, reason),), notes)


def is_tied(member: Member) -> bool:
    """Whether a model's head is its embeddings: as its config says or, when it does not say, as its file shows."""
    config = member.checkpoint.config
    node = config_node(config, member.stack.node)
    return bool(node.get(TIE, config.get(TIE, _only(member.checkpoint, HEAD) is None)))


def _tie(donor: Member, tied: bool, reason: str) -> Edit:
    """The edit of the config, where it speaks of ties already or else beside the depth."""
    config, node = donor.checkpoint.config, donor.stack.node
    path = () if TIE not in config_node(config, node) and TIE in config else node
    return Edit(key=".".join((*path, TIE)), before=config_node(config, path).get(TIE), after=tied, reason=reason)


def _check_shapes(donor: Checkpoint, alias: str, parts: Sequence[Outside]) -> None:
    """Refuse tensors that would not load under the config of the donor, such as those of another vocabulary."""
    for part in parts:
        mine = donor.tensors.get(part.name) or (_only(donor, TOKENS) if HEAD.search(part.name) else None)
        if mine is not None and mine.shape != part.tensor.shape:
            found = f"the shape of {part.name} is {list(mine.shape)} in one and {list(part.tensor.shape)} in the other"
            raise RefusedError(f"'{alias}' and '{part.model}' do not fit together: {found}")


def _only(checkpoint: Checkpoint, pattern: re.Pattern[str]) -> Tensor | None:
    return next((tensor for tensor in checkpoint.tensors.values() if pattern.search(tensor.name)), None)
