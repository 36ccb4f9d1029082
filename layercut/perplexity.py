"""Perplexity on held-out text, and a sample of what a model writes. Says how good a model is; takes no decision."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from layercut.architecture import find_stack
from layercut.caches import cache_folder
from layercut.calibration import Single
from layercut.chats import ChatTemplate
from layercut.checkpoint import open_checkpoint
from layercut.documents import passages
from layercut.errors import CalibrationError, CheckpointError
from layercut.loading import bos_prefix, encode, load_causal_lm, load_tokenizer, pick_device, quiet, settled_dtype
from layercut.memory import give_back
from layercut.plan import Record
from layercut.relay import Place, Relay
from layercut.routes import Order
from layercut.sampling import RefusedConversation, windows
from layercut.schedules import fits, rooms
from layercut.skeleton import Skeleton
from layercut.stack import LayerRef
from layercut.tokens import Sample
from layercut.weights import Weights

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
    """A model with its LM head and its tokenizer, loaded once for several uses; or streamed layer by layer, where it does not fit."""

    def __init__(self, folder: Path, *, dtype: str | None = None, device: str | None = None, memory: int | None = None) -> None:
        """`memory` is what the process may take, in bytes; None for what is free. Both ways give the same numbers."""
        self.folder = folder
        self.device = pick_device(device)
        self.tokenizer = load_tokenizer(folder)
        self._streamed = self._open(dtype, memory)
        self.model = load_causal_lm(folder, self.device, dtype) if self._streamed is None else self._streamed.model

    def _open(self, dtype: str | None, memory: int | None) -> _Streamed | None:
        """The model layer by layer; None when it fits into memory."""
        checkpoint = open_checkpoint(self.folder)
        gc.collect()  # models that were used before
        give_back()
        room, host = rooms(self.device, memory, 1)
        if fits([checkpoint], self.device, dtype, room):
            return None
        stack, weights = find_stack(checkpoint), Weights(checkpoint, pinned=self.device.type == "cuda")
        settled = settled_dtype(checkpoint, self.device, dtype)
        skeleton = Skeleton(checkpoint, weights, stack.depth, stack.prefix, self.device, settled, AutoModelForCausalLM)
        name = str(self.folder)
        layers = tuple(LayerRef(model=name, index=index) for index in range(stack.depth))
        relay = Relay({name: skeleton}, Place(self.device, room, host, cache_folder()))
        return _Streamed(skeleton.model, relay, Order(name, layers, name))

    def perplexity(self, calibration: Single, *, progress: bool = True) -> Perplexity:
        """Perplexity on consecutive windows of `max_length` tokens, `samples` of them at most.

        Documents are joined by a blank line. Each window starts with BOS when the policy says so; the rest at the end is
        dropped unless it is the only window. The built-in text gives its held-out part. The loss is computed in float32
        from the logits of the model. Raises CalibrationError when there is no text, CheckpointError on a loss that is not
        finite.
        """
        total, tokens, count = 0.0, 0, 0
        if self._streamed is not None:
            self._streamed.relay.progress = progress
        with tqdm(total=calibration.most, desc="perplexity", unit="window", disable=not progress, leave=False) as bar, quiet():
            for batch, loss in self._losses(self._batches(calibration)):
                total += loss
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
        """What the model writes after `prompt`: at most `tokens` tokens, greedy, with KV cache. The prompt is not repeated.

        A model that is streamed is read once for every token.
        """
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False).to(self.device)
        if not inputs["input_ids"].numel():
            raise CalibrationError("the prompt gives no tokens")
        if self._streamed is not None:
            return self._written(self._streamed, inputs["input_ids"][0].tolist(), tokens)
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
        limit = LOGIT_BYTES if self._streamed is None else self._streamed.relay.limit(LOGIT_BYTES)
        fits = limit // (calibration.max_length * self.model.config.get_text_config().vocab_size * itemsize)
        while batch := list(itertools.islice(cut, max(1, min(calibration.batch_size, fits)))):
            if positions is not None and len(batch[0]) > positions:
                message = f"the model has {positions} positions, but a window has {len(batch[0])} tokens"
                raise CalibrationError(message, where=self.folder, hint=f"set max_length to {positions} or less")
            yield batch

    def _losses(self, batches: Iterable[list[list[int]]]) -> Iterator[tuple[list[list[int]], float]]:
        """Batches of equally long windows, and the sums of the negative log-likelihoods of all their tokens but the first."""
        if self._streamed is not None:
            yield from self._streamed.losses(list(batches))
            return
        for batch in batches:
            with torch.inference_mode():
                yield batch, _loss(batch, self.model(input_ids=torch.tensor(batch, device=self.device), use_cache=False).logits)

    def _written(self, streamed: _Streamed, prompt: list[int], tokens: int) -> str:
        """The same, token by token, without a cache of keys and values."""
        end = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        ids = list(prompt)
        while len(ids) < len(prompt) + tokens:
            ids.append(streamed.next(ids))
            if ids[-1] in ends:
                break
        text: str = self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        return text


class _Streamed(NamedTuple):
    """A model layer by layer."""

    model: Any
    relay: Relay
    order: Order

    def losses(self, batches: list[list[list[int]]]) -> Iterator[tuple[list[list[int]], float]]:
        """As `LanguageModel._losses`."""
        found: list[float] = []
        samples = [[Sample(number, window) for number, window in enumerate(batch)] for batch in batches]
        self.relay.run([self.order], samples, lambda number, batch, logits: found.append(_loss([one.ids for one in batch], logits)))
        yield from zip(batches, found, strict=True)

    def next(self, ids: list[int]) -> int:
        """The likeliest token after these."""
        found: list[int] = []
        self.relay.run([self.order], [[Sample(0, ids)]], lambda number, batch, logits: found.append(int(logits[0, -1].argmax())))
        return found[0]


def _loss(batch: Sequence[Sequence[int]], logits: Tensor) -> float:
    """Sum of the negative log-likelihoods of all tokens of equally long windows but their first."""
    predicted = logits[:, :-1].flatten(0, 1)
    targets = torch.tensor(batch, device=logits.device)[:, 1:].flatten()
    step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    losses = [
        torch.nn.functional.cross_entropy(part.float(), target, reduction="none").double().sum()
        for part, target in zip(torch.split(predicted, step), torch.split(targets, step), strict=True)
    ]
    return float(sum(losses))


def perplexity(
    folder: Path,
    calibration: Single,
    *,
    dtype: str | None = None,
    device: str | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a checkpoint; see `LanguageModel.perplexity`."""
    return LanguageModel(folder, dtype=dtype, device=device, memory=memory).perplexity(calibration, progress=progress)


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
