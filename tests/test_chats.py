"""Chats, with real tokenizers: what a template writes, which tokens the assistant wrote, and what happens to templates that do harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, chat_tokenizer, failure
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.chats import ChatTemplate
from layercut.chattemplates import TEMPLATES
from layercut.conversations import Conversation
from layercut.errors import CalibrationError
from layercut.sampling import RefusedConversation

TAGGED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ message.content }}"
    "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
"""ChatML with generation tags."""
THINKING = """
{%- set last = messages | selectattr('role', 'equalto', 'user') | list | length %}
{%- set seen = namespace(users=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}
{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set words = message.content.split('</think>')[-1].lstrip('\n') %}
{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in message.content else '' %}
{{- '<|im_start|>assistant\n' }}
{%- if seen.users == last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- words + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}"""
"""As Qwen3's: thoughts are written in the last turn only, so that no prefix of a conversation renders as a part of the whole."""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
TALK: Conversation = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi hi"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "more words"},
)


def template(text: str | None = CHATML, **special: Any) -> ChatTemplate:
    return ChatTemplate({"m": chat_tokenizer(text, **special)})


def written(text: str, talk: Conversation = TALK, **special: Any) -> list[str]:
    """The runs of tokens that the assistant wrote."""
    tokenizer = chat_tokenizer(text, **special)
    chat = ChatTemplate({"m": tokenizer})
    whole = chat.text(talk)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    wanted = chat.completion(talk, whole, ids)
    assert len(wanted) == len(ids)
    runs, run = [], list[int]()
    for token, mine in [*zip(ids, wanted, strict=True), (0, False)]:
        if mine:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def fault(call: Any, kind: type[Exception] = CalibrationError) -> str:
    return failure(kind, call)


# The text


def test_the_text_is_what_transformers_makes_of_it() -> None:
    tokenizer = chat_tokenizer()
    assert template().text(TALK) == tokenizer.apply_chat_template([dict(turn) for turn in TALK], tokenize=False)
    assert template().text(TALK[1:3]) == "<|im_start|>user\nhi hi<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"


def test_the_first_template_among_several_models_counts() -> None:
    models = {"base": chat_tokenizer(None), "chat": chat_tokenizer(CHATML), "other": chat_tokenizer("{{ messages[0].content }}")}
    assert ChatTemplate(models).text(TALK).startswith("<|im_start|>system")


def test_no_template() -> None:
    hint = "put the chat_template.jinja of its chat model beside it, or name a column of plain text"
    message = "the text holds conversations, but no chat template comes with the tokenizer of"
    assert fault(lambda: template(None)) == f"{message} 'm'; {hint}"
    assert fault(lambda: ChatTemplate({"a": chat_tokenizer(None), "b": chat_tokenizer(None)})) == f"{message} 'a' and 'b'; {hint}"


def test_several_templates() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "T"}
    assert ChatTemplate({"m": tokenizer}).text(TALK) == "Dbe brief"
    tokenizer.chat_template = {"rag": "R", "tool_use": "T"}
    assert fault(lambda: ChatTemplate({"m": tokenizer})).startswith("the chat template of 'm' cannot be told: This model has multiple")


@pytest.mark.parametrize(
    ("asked", "day"),
    [("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26"), ("%A, %B %-d", "Friday, July 26"), ("%H:%M", "12:00"), ("%F", "2024-07-26")],
)
def test_templates_that_print_the_date_print_one_day(asked: str, day: str) -> None:
    assert template(f"{{{{ strftime_now('{asked}') }}}}: {{{{ messages[0].content }}}}").text(TALK) == f"{day}: be brief"
    llama = "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    assert template(llama + "{% endif %}Today: {{ date_string }}").text(TALK) == "Today: 26 Jul 2024"


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  {% if true %}x{% endif %}", "  {% if true %}x{% endif %}\n"])
def test_the_date_leaves_white_space_alone(start: str) -> None:
    said = template(start + "{{ messages[0].content }}").text(TALK)
    assert template(start + "{{ messages[0].content }}{% if false %}{{ strftime_now('%Y') }}{% endif %}").text(TALK) == said


# What the assistant wrote


def test_generation_tags_count() -> None:
    assert written(TAGGED) == ["hi<|im_end|>", "more words<|im_end|>"]
    dashed = TAGGED.replace("{% generation %}", "{%- generation -%}").replace("{% endgeneration %}", "{%- endgeneration -%}")
    assert [run.removesuffix("<|im_end|>") for run in written(dashed)] == ["hi", "more words"]


def test_without_tags_the_words_are_found_and_the_token_that_ends_the_turn() -> None:
    assert written(CHATML) == written(TAGGED) == ["hi<|im_end|>", "more words<|im_end|>"]
    assert written(CHATML, TALK[:2]) == []
    assert written(CHATML, ({"role": "assistant", "content": ""}, TALK[1])) == ["<|im_end|>"]
    assert written(CHATML.replace("<|im_end|>", ""), TALK) == ["hi", "more words"]


@settings(max_examples=40)
@given(st.lists(st.text(st.sampled_from("ab \n<|im_end|>\ue000"), max_size=8), min_size=1, max_size=5))
def test_the_words_are_those_that_tags_would_mark(contents: list[str]) -> None:
    talk = tuple({"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents))
    assert written(CHATML, talk) == written(TAGGED, talk)


def test_words_that_stand_in_the_conversation_before() -> None:
    talk = ({"role": "user", "content": "aba ab"}, {"role": "assistant", "content": "ab"}, {"role": "user", "content": "ab"})
    assert written(CHATML, talk) == ["ab<|im_end|>"]
    assert written("{% for m in messages %}{{ m.content }}{% endfor %}", talk) == ["ab"]


def test_a_template_that_rewrites_earlier_turns() -> None:
    """Thoughts of earlier turns are gone, and those of the last one are the assistant's words."""
    thought = "<think>\nwell\n</think>\n\n"
    talk = (*TALK[1:2], {"role": "assistant", "content": f"{thought}hi"}, *TALK[3:4], {"role": "assistant", "content": f"{thought}bye"})
    assert "<think>" not in template(THINKING).text(talk).partition("more")[0]
    first, last = written(THINKING, talk)
    assert first == "hi<|im_end|>"
    assert last.startswith("well") and last.endswith("bye<|im_end|>")
    assert written(THINKING, TALK[1:]) == ["hi<|im_end|>", "more words<|im_end|>"]


def test_a_template_that_trims_and_one_with_bos() -> None:
    talk = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "  words \n"})
    assert [run.strip() for run in written(MISTRAL, talk)] == ["words<|im_end|>"]
    assert template(MISTRAL).text(talk) == "<s>[INST] hi [/INST] words<|im_end|>"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("first", [0, 1])
def test_templates_that_models_have(name: str, first: int) -> None:
    """Those that recipes may name: the system message is left out or not, and turns end with a special token or with text."""
    assert [run.removesuffix("<|im_end|>") for run in written(TEMPLATES[name], TALK[first:])] == ["hi", "more words"]


def test_calls_of_tools_are_written_by_the_assistant() -> None:
    calls = "{% for call in m.tool_calls or [] %}[{{ call.name }}]{% endfor %}"
    calling = "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content or '' }}" + calls + "<|im_end|>{% endfor %}"
    talk = (TALK[1], {"role": "assistant", "tool_calls": [{"name": "f"}, {"name": "g"}]}, {"role": "tool", "content": "5"}, TALK[2])
    assert written(calling, talk) == ["[f][g]<|im_end|>", "hi<|im_end|>"]


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}",  # once more at the end
        "{{ messages[0].content }}",  # not at all
        "{{ messages[2].content | length }}{% for m in messages | reverse %}{{ m.content }};{% endfor %}",  # in another order
    ],
)
def test_turns_that_cannot_be_told(text: str) -> None:
    hint = "use another token than completion, or a template with {% generation %} tags"
    message = fault(lambda: written(text))
    assert message in [f"the chat template of 'm' does not write turn {turn} of a conversation in one place; {hint}" for turn in (3, 5)]


def test_a_tokenizer_that_does_not_know_where_its_tokens_stand() -> None:
    tokenizer = chat_tokenizer()

    class Slow:
        is_fast = False
        chat_template = CHATML
        get_chat_template = tokenizer.get_chat_template
        apply_chat_template = tokenizer.apply_chat_template

    chat = ChatTemplate({"m": Slow()})
    text = chat.text(TALK)
    message = "the tokenizer of 'm' does not tell which characters a token stands for, so that completions are unknown"
    assert fault(lambda: chat.completion(TALK, text, [])) == f"{message}; use another token than completion"


def test_without_pad_and_bos() -> None:
    assert written(CHATML, pad_token=None, bos_token=None) == ["hi<|im_end|>", "more words<|im_end|>"]
    assert written(TAGGED, pad_token=None, bos_token=None) == ["hi<|im_end|>", "more words<|im_end|>"]


# Templates that do not run, or do harm


def test_what_a_template_refuses() -> None:
    message = fault(lambda: template(MISTRAL).text(TALK), RefusedConversation)
    assert message == "Conversation roles must alternate user/assistant/user/assistant/..."


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{% for", "TemplateSyntaxError"),
        ("{{ messages[0]['content'] + 5 }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ messages[0].content | no_filter }}", "TemplateAssertionError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
    ],
)
def test_templates_that_do_not_run(text: str, kind: str) -> None:
    assert fault(lambda: template(text).text(TALK)).startswith(f"the chat template of 'm' does not run: {kind}: ")


@pytest.mark.parametrize(
    "attack",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.append(5)",
        "raise_exception.__globals__['__builtins__']['open'](path, 'w')",
        "strftime_now.__globals__['os'].system('touch ' + path)",
        "cycler.__init__.__globals__.os.system('touch ' + path)",
        "(messages[0].content ~ '{0.__class__}').format(messages)",
        "messages|map(attribute='__class__')|list",
        "namespace(__init__=1)",
    ],
)
def test_templates_have_no_way_out_of_the_sandbox(attack: str, tmp_path: Path) -> None:
    """What a template of a stranger tries is refused, or yields nothing; no file is made, and the messages stay as they are."""
    path, talk = tmp_path / "harm", [dict(turn) for turn in TALK]
    text = f"{{% set path = '{path}' %}}[{{{{ {attack} }}}}]"
    try:
        said = template(text).text(tuple(talk))
    except CalibrationError as error:
        assert str(error).startswith("the chat template of 'm' does not run: ")
    else:
        assert "class" not in said.removeprefix("[")
    assert not path.exists()
    assert talk == [dict(turn) for turn in TALK]
