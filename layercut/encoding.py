"""Encoding: one reading of the text for several models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from layercut.chats import ChatTemplate
from layercut.conversations import Conversation
from layercut.errors import CalibrationError, RefusedError
from layercut.loading import bos_prefix, encode
from layercut.sampling import Encoded


class SharedTokenizer:
    """One encoding for several models: refuses the first text that their tokenizers read differently."""

    def __init__(self, tokenizers: Mapping[str, Any], bos: bool | Literal["auto"]) -> None:
        self._tokenizers = dict(tokenizers)
        self._bos = bos
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

    @cached_property
    def separator(self) -> int:
        """The token between packed documents: EOS, or else BOS. Raises CalibrationError when there is neither."""
        found = self._first.eos_token_id if self._first.eos_token_id is not None else self._first.bos_token_id
        if found is None:
            message = f"the tokenizer of '{self._alias}' has neither EOS nor BOS to stand between packed documents"
            raise CalibrationError(message, hint="leave out packed")
        return int(found)

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

    def converse(self, conversation: Conversation, completions: bool) -> Encoded:
        """A conversation as the first chat template among the models writes it, the same for every model.

        BOS is what the template does by default; `bos: true` adds one that is not there, `bos: false` takes it away. Raises
        RefusedConversation when the template does not take the conversation.
        """
        text = self._template.text(conversation)
        ids = self.encode(text)
        completion = self._template.completion(conversation, text, ids) if completions else None
        drop = int(self._bos is False and self.begins(ids))
        add = self.prefix if self._bos is True and not self.begins(ids) else []
        return Encoded([*add, *ids[drop:]], None if completion is None else [False] * len(add) + completion[drop:])

    def begins(self, ids: list[int]) -> bool:
        """Whether these tokens start with BOS."""
        return bool(ids) and ids[0] == self._first.bos_token_id

    def tokens(self, ids: list[int]) -> list[str]:
        """The tokens as text."""
        return list(self._first.convert_ids_to_tokens(ids))

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizers)

    def _refuse(self, alias: str, reason: str, hint: str | None = None) -> None:
        message = f"the tokenizers of '{self._alias}' and '{alias}' differ: {reason}"
        raise RefusedError(message, hint=hint or "distances between two models need the same tokens")
