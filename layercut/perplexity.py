"""Perplexity on held-out text, and a sample of what a model writes. Says how good a model is; takes no decision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from layercut.calibration import Single
from layercut.chats import ChatTemplate
from layercut.documents import passages
from layercut.errors import CalibrationError, CheckpointError
from layercut.loading import bos_prefix, encode, load_causal_lm, load_tokenizer, pick_device, quiet
from layercut.plan import Record
from layercut.sampling import RefusedConversation, windows

LOGIT_BYTES = 256 << 20
"""Bytes of the logits of one forward pass at most, unless a single window takes more."""
CHUNK_BYTES = 64 << 20
"""Bytes of the float32 copy of the logits that the loss is computed from at a time."""


class Perplexity(Record):
    """How well a model predicts held-out text."""

    value: float
    """exp(nll)."""
    nll: float
    """Mean negative log-likelihood of a predicted token, in nats; every token weighs the same."""
    tokens: int
    """Tokens that were predicted: all of a window but its first."""
    windows: int
    """Windows of text."""
    max_length: int
    """Tokens of a window, a BOS token included."""
    dtype: str
    """Dtype that the model ran in."""
    source: str
    """The text: `builtin`, a path, or a dataset."""


class LanguageModel:
    """A model with its LM head and its tokenizer, loaded once for several uses."""

    def __init__(self, folder: Path, *, dtype: str | None = None, device: str | None = None) -> None:
        self.folder = folder
        self.device = pick_device(device)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_causal_lm(folder, self.device, dtype)

    def perplexity(self, calibration: Single, *, progress: bool = True) -> Perplexity:
        """Perplexity on consecutive windows of `max_length` tokens, `samples` of them at most.

        Documents are joined by a blank line. Each window starts with BOS when the policy says so; the rest at the end is
        dropped unless it is the only window. The built-in text gives its held-out part. The loss is computed in float32
        from the logits of the model. Raises CalibrationError when there is no text, CheckpointError on a loss that is not
        finite.
        """
        total, tokens, count = 0.0, 0, 0
        with tqdm(total=calibration.most, desc="perplexity", unit="window", disable=not progress, leave=False) as bar, quiet():
            for batch in self._batches(calibration):
                total += self._loss(batch)
                tokens += len(batch) * (len(batch[0]) - 1)
                count += len(batch)
                bar.update(len(batch))
        if not tokens:
            raise CalibrationError("the text gives no tokens to predict", where=calibration.title)
        nll = total / tokens
        if not nll < math.log(torch.finfo(torch.float64).max):
            raise CheckpointError(f"the loss is not finite ({nll})", where=self.folder)
        return Perplexity(
            value=math.exp(nll),
            nll=nll,
            tokens=tokens,
            windows=count,
            max_length=calibration.max_length,
            dtype=str(self.model.dtype).removeprefix("torch."),
            source=calibration.title,
        )

    def generate(self, prompt: str, tokens: int = 30) -> str:
        """What the model writes after `prompt`: at most `tokens` tokens, greedy, with KV cache. The prompt is not repeated."""
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False).to(self.device)
        if not inputs["input_ids"].numel():
            raise CalibrationError("the prompt gives no tokens")
        own = self.model.generation_config
        # A fresh configuration: the one of the checkpoint may sample, search with beams, or forbid words.
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=tokens, do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=0
        )
        self.model.generation_config = config
        try:
            with quiet(), torch.inference_mode():
                output = self.model.generate(**inputs, generation_config=config)
        finally:
            self.model.generation_config = own
        text: str = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def _batches(self, calibration: Single) -> Iterator[list[list[int]]]:
        """Windows in batches whose logits stay small. All windows have one length, so none is padded."""
        prefix = bos_prefix(self.tokenizer, calibration.bos)
        room = calibration.max_length - len(prefix)
        if room < 1:
            raise CalibrationError(f"max_length {calibration.max_length} leaves no room after {len(prefix)} special tokens")
        text = (encode(self.tokenizer, part) for part in _joined(calibration, self.tokenizer, self.folder))
        cut = itertools.islice(([*prefix, *window] for window in windows(text, room)), calibration.most)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        itemsize = torch.finfo(self.model.dtype).bits // 8
        fits = LOGIT_BYTES // (calibration.max_length * self.model.config.get_text_config().vocab_size * itemsize)
        while batch := list(itertools.islice(cut, max(1, min(calibration.batch_size, fits)))):
            if positions is not None and len(batch[0]) > positions:
                message = f"the model has {positions} positions, but a window has {len(batch[0])} tokens"
                raise CalibrationError(message, where=self.folder, hint=f"set max_length to {positions} or less")
            yield batch

    def _loss(self, batch: list[list[int]]) -> float:
        """Sum of the negative log-likelihoods of all tokens of equally long windows but their first."""
        ids = torch.tensor(batch, device=self.device)
        with torch.inference_mode():
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten()
            step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
            losses = [
                torch.nn.functional.cross_entropy(part.float(), target, reduction="none").double().sum()
                for part, target in zip(torch.split(logits, step), torch.split(targets, step), strict=True)
            ]
        return float(sum(losses))


def perplexity(
    folder: Path, calibration: Single, *, dtype: str | None = None, device: str | None = None, progress: bool = True
) -> Perplexity:
    """Perplexity of a checkpoint; see `LanguageModel.perplexity`."""
    return LanguageModel(folder, dtype=dtype, device=device).perplexity(calibration, progress=progress)


def generate(folder: Path, prompt: str, tokens: int = 30) -> str:
    """What a checkpoint writes after a prompt; see `LanguageModel.generate`."""
    return LanguageModel(folder).generate(prompt, tokens)


def _joined(calibration: Single, tokenizer: Any, folder: Path) -> Iterator[str]:
    """The text as one: documents and files are separated by a blank line, the parts of a running text by nothing.

    A conversation is what the chat template makes of it; one that it does not take is left out.
    """
    first, stream, template = True, None, None
    for content, part_of, _ in passages(calibration, held_out=True):
        goes_on = first or (part_of is not None and part_of == stream)
        if isinstance(content, str):
            text = content
        else:
            template = template or ChatTemplate({str(folder): tokenizer})
            try:
                text = template.text(content)
            except RefusedConversation:
                continue
        yield text if goes_on else "\n\n" + text
        first, stream = False, part_of
