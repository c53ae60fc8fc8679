"""Chat templates against transformers' apply_chat_template."""

from __future__ import annotations

import json
from datetime import datetime
from enum import Enum
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minisgl.text import ChatTemplate, load_text
from minisgl.types import RequestError

USER = {"role": "user", "content": "What's 1 < 2 & 'x'? 東京 🙂\n"}
CHATS = [
    [USER],
    [{"role": "system", "content": "  Be brief.  "}, USER],
    [USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": ""}],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather & wind of a <place>",
            "parameters": {"type": "object", "properties": {"place": {"type": "string", "enum": ["Zürich", "東京"]}}},
        },
    }
]
TEMPLATES = {
    "whitespace": "  {%- for m in messages %}\n    {% if m.role == 'user' %}\n  U:{{ m.content }}\n"
    "    {% endif %}\n{% endfor %}\n\n",
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}",
    "tojson_options": "{{ tools | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "special_tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{{ sep_token }}",
    "loop_controls": "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}[{{ m.content }}]{% endfor %}",
    "generation_tag": "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n }}",
    "macro": "{% macro show(m, sep='|') %}{{ m.role }}{{ sep }}{{ m.content.strip() }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
    "reversed_and_slices": "{% for m in messages[::-1] %}{{ m.content[:3] }}{{ m.content.split(' ')[-1] }}{% endfor %}",
    "undefined": "{{ nothing }}{% if tools is defined and tools is not none %}T{% endif %}"
    "{% if documents %}D{% endif %}",
    "prompt": "{% if add_generation_prompt %}go{% endif %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}",
    "year": "{{ strftime_now('%Y %b') }}",
    "dict_of": "{{ dict(a=1, b='x') | tojson }}{% for k, v in tools[0].function.items() %}{{ k }}{% endfor %}",
}


def transformers_tokenizer(byte_level, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", range(len(CHATS)))
def test_render_agrees_with_transformers(name: str, chat: int, byte_level) -> None:
    template, messages = TEMPLATES[name], CHATS[chat]
    theirs = transformers_tokenizer(byte_level, template)
    ours = ChatTemplate({"default": template}, {"bos_token": "<s>", "eos_token": "</s>"})
    for options in ({"add_generation_prompt": False}, {"add_generation_prompt": True, "enable_thinking": False}):
        expected = theirs.apply_chat_template(messages, tools=TOOLS, tokenize=False, **options)
        assert ours.render(messages, tools=TOOLS, **options) == expected


def test_render_agrees_with_transformers_on_smollm2(smollm2_path: Path) -> None:
    ours = load_text(smollm2_path).chat_template
    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    for messages in CHATS:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert ours.render(messages, add_generation_prompt=prompt) == expected


def test_raise_exception_carries_its_message_to_the_client() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {})
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        template.render([USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for m in messages %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_render_turns_every_failure_of_a_template_into_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate({"default": source}, {}).render([USER])


def test_render_does_not_change_the_messages() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    ChatTemplate({"default": "{{ messages }}"}, {}).render(messages)
    assert json.dumps(messages) == before


def test_render_joins_text_parts_and_refuses_others() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "a\nb"
    with pytest.raises(RequestError, match=r"messages\[0\] has a content part of type image_url"):
        template.render([{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {}}]}])
    with pytest.raises(RequestError, match="part of type int"):
        template.render([{"role": "user", "content": [1]}])


def test_render_gives_the_template_plain_data_only() -> None:
    class Role(str, Enum):
        USER = "user"

    template = ChatTemplate({"default": "{{ messages[0].role }}{{ messages[0].x }}"}, {})
    assert (
        template.render([{"role": Role.USER, "content": "", "x": (1, 2.5, None, True)}]) == "user[1, 2.5, None, True]"
    )
    with pytest.raises(RequestError, match=r"messages\[0\]\.x is a datetime"):
        template.render([{"role": "user", "content": "", "x": datetime.now()}])
    with pytest.raises(RequestError, match=r"^tools\[0\]\.f is a builtin"):
        template.render([USER], tools=[{"f": print}])
    with pytest.raises(RequestError, match=r"messages\[0\] is a str"):
        template.render(["hello"])


def test_named_templates_give_tool_use_to_requests_with_tools(byte_level, save) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = load_text(save(byte_level, tokenizer_config={"chat_template": named})).chat_template
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "tools"
    assert ChatTemplate({"default": "plain"}, {}).render([USER], tools=TOOLS) == "plain"
    with pytest.raises(RequestError, match="no default chat template, only rag"):
        ChatTemplate({"rag": "x"}, {}).render([USER])


def test_template_file_goes_before_tokenizer_config(byte_level, save) -> None:
    folder = save(byte_level, tokenizer_config={"chat_template": "old"})
    assert load_text(folder).chat_template.render([USER]) == "old"
    (folder / "chat_template.jinja").write_text("new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    template = load_text(folder).chat_template
    assert (template.render([USER]), template.render([USER], tools=TOOLS)) == ("new", "tools")


def test_a_template_is_compiled_once(monkeypatch) -> None:
    template = ChatTemplate({"default": "x"}, {})
    template.render([USER])
    monkeypatch.setattr(template._env, "from_string", lambda source: pytest.fail("compiled again"))
    assert template.render([USER]) == "x"
