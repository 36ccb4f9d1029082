from __future__ import annotations

import pytest
from conftest import byte_tokenizer

from layercut.chattemplates import TEMPLATES, template_text

TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize(
    ("name", "text", "prompt"),
    [
        ("alpaca", "Be kind.\n\n### Instruction:\nHello\n\n### Response:\nHi</s>\n\n", "### Response:\n"),
        (
            "chatml",
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
        ("exaone", "[|system|]Be kind.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi[|endofturn|]\n", "[|assistant|]"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>Be kind.\n\n[INST] Hello [/INST]Hi</s>", ""),
    ],
)
def test_what_a_conversation_becomes(name: str, text: str, prompt: str) -> None:
    tokenizer = byte_tokenizer()
    for add in (False, True):
        found = tokenizer.apply_chat_template(TALK, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=add)
        assert found == text + prompt * add


def test_names_and_texts() -> None:
    assert template_text("chatml") == TEMPLATES["chatml"]
    assert template_text("{{ messages }}") == "{{ messages }}"
    assert template_text("unheard of") is None
