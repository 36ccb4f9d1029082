"""Encoding: one reading of the text for several models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from layercut.errors import RefusedError
from layercut.loading import bos_prefix, encode


class SharedTokenizer:
    """One encoding for several models: refuses the first text that their tokenizers read differently."""

    def __init__(self, tokenizers: Mapping[str, Any], bos: bool | Literal["auto"]) -> None:
        self._tokenizers = dict(tokenizers)
        self._alias, self._first = next(iter(self._tokenizers.items()))
        self.prefix = bos_prefix(self._first, bos)
        vocabulary: dict[str, int] = self._first.get_vocab()
        for alias, tokenizer in list(self._tokenizers.items())[1:]:
            for token, index in sorted(tokenizer.get_vocab().items()):
                if vocabulary.get(token, index) != index:
                    self._refuse(alias, f"token '{token}' is {vocabulary[token]} in '{self._alias}' and {index} in '{alias}'")
            prefix = bos_prefix(tokenizer, bos)
            if prefix != self.prefix:
                reason = f"samples start with {self.tokens(self.prefix)} in '{self._alias}' and {self.tokens(prefix)} in '{alias}'"
                self._refuse(alias, reason, "set bos: true or bos: false")

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens, the same for every model."""
        ids = encode(self._first, text)
        for alias, tokenizer in list(self._tokenizers.items())[1:]:
            other = encode(tokenizer, text)
            if other != ids:
                at = next((at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
                shown = " and ".join(str(part[at]) if at < len(part) else "the end" for part in (ids, other))
                self._refuse(alias, f"token {at} of a text is {shown}")
        return ids

    def tokens(self, ids: list[int]) -> list[str]:
        """The tokens as text."""
        return list(self._first.convert_ids_to_tokens(ids))

    def _refuse(self, alias: str, reason: str, hint: str | None = None) -> None:
        message = f"the tokenizers of '{self._alias}' and '{alias}' differ: {reason}"
        raise RefusedError(message, hint=hint or "distances between two models need the same tokens")
