"""What stands before and behind the layers of a stack: embeddings, final norm and head, and whether head and embeddings are tied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from layercut.architecture import LayerStack, Member, config_node
from layercut.checkpoint import Checkpoint, Tensor
from layercut.plan import Edit

# Words in the name of a tensor outside the stack that put it behind the last layer: final norm and heads.
BEHIND = re.compile(
    r"(^|[._])(norm|norm_?f|ln_?f|final_\w*norm|layer_?norm|lm_head|head|embed_out|score|classifier|pooler|project_out|cls|output)([._]|$)"
)
EMBEDDING = re.compile(r"(^|[._])(embeddings|embed|wte|wpe)[._]")
# The token embeddings and the head that may be tied to them.
TOKENS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|embeddings?)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


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
    behind = [tensor for tensor in found if BEHIND.search(tensor.name) and not EMBEDDING.search(tensor.name)]
    return tuple(tensor for tensor in found if tensor not in behind), tuple(behind)


def find_ends(members: Mapping[str, Member], donor: str, first: str, last: str) -> Ends:
    """What stands before the stack comes from the model of its first layer, what stands behind it from the model of its last.

    A head that is tied to the embeddings is not in the file. Where the two models differ in that, the head that the last
    model uses is written out, and the config says that it is not tied.
    """
    before = tuple(Outside(tensor.name, tensor, first) for tensor in outside(*members[first])[0])
    behind = tuple(Outside(tensor.name, tensor, last) for tensor in outside(*members[last])[1])
    if first == last:
        return Ends(before, behind)
    heads = {alias: _only(members[alias].checkpoint, HEAD) for alias in (first, last)}
    own = _only(members[last].checkpoint, TOKENS)
    notes: tuple[str, ...] = ()
    if heads[last] is None and heads[first] is None:
        notes = (f"head and embeddings stay tied: both come from '{first}'",)
    elif heads[last] is None and own is not None:
        name = heads[first]
        assert name is not None
        behind = (*behind, Outside(name.name, own, last))
    node = config_node(members[donor].checkpoint.config, members[donor].stack.node)
    tied = node.get("tie_word_embeddings", _only(members[donor].checkpoint, HEAD) is None)
    written = any(HEAD.search(part.name) for part in behind)
    if written and tied:
        key = ".".join((*members[donor].stack.node, "tie_word_embeddings"))
        reason = f"the head of '{last}' is not the embeddings of '{first}'"
        return Ends(before, behind, (Edit(key=key, before=node.get("tie_word_embeddings"), after=False, reason=reason),), notes)
    return Ends(before, behind, (), notes)


def _only(checkpoint: Checkpoint, pattern: re.Pattern[str]) -> Tensor | None:
    return next((tensor for tensor in checkpoint.tensors.values() if pattern.search(tensor.name)), None)
