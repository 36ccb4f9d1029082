"""Words in tensor names and config paths that say which stack of a model is meant: its tower, and its side of an encoder-decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

TEXT = "text"
Side = Literal["encoder", "decoder"]

# A tower that is not the language model, and the words that mark it; the first row that fits decides.
TOWERS: tuple[tuple[str, str], ...] = (
    ("mtp", r"mtp"),
    ("draft", r"draft"),
    ("talker", r"talker|code_predictor|code2wav|token2wav"),
    ("t2u", r"t2u"),
    ("timestamp", r"timestamp"),
    ("depth_decoder", r"depth_decoder"),
    ("qformer", r"qformer"),
    ("action", r"action_expert|gemma_expert|\bdit\b|dit_"),
    ("patcher", r"patcher"),
    ("projector", r"projector|resampler|connector|aligner\b|adapter_layers"),
    ("codec", r"\bvq|codec|quantizer|vocoder"),
    ("vision", r"vision|visual|vit\b|image|video_tower"),
    ("audio", r"audio|speech|sound"),
)
OTHER_STACKS = re.compile("|".join(words for _, words in TOWERS))
"""Words that mark a stack which is not the language stack."""


class Role(NamedTuple):
    """Which stack a name speaks of."""

    tower: str
    side: Side | None

    @property
    def name(self) -> str:
        """What the stack is called."""
        return self.side if self.tower == TEXT and self.side is not None else self.tower


def role_of(parts: Sequence[str]) -> Role:
    """The role that the parts of a tensor prefix, or of a config path, speak of."""
    text = ".".join(parts)
    tower = next((name for name, words in TOWERS if re.search(words, text)), TEXT)
    return Role(tower, side_of(parts))


def side_of(parts: Sequence[str]) -> Side | None:
    """`encoder` or `decoder`, when a part says so; the first one does."""
    for part in parts:
        found = re.search(r"(?:^|_)(encoder|decoder)(?:_|$)", part)
        if found is not None:
            return "encoder" if found[1] == "encoder" else "decoder"
    return None
