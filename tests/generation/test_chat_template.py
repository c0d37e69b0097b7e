"""Chat templates are programs of strangers: equal to transformers where they work, one error where they do not."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from l2d_framework.errors import ConfigError, DataError
from l2d_framework.generation import chat_template
from l2d_framework.generation.chat_template import TEMPLATE_DATE, check_conversation, check_text, render
from l2d_framework.generation.prompts import encode_prompts, read_template

ASKED = [{"role": "user", "content": "Hi\u2028 {{ x }}"}]
CONVERSATION = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": " Yo\n"}]
TOOLED = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 10**12, "b": [1, 2.5]}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "Three.", "reasoning": "easy"},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

WORKING = {
    "tulu": read_template("tulu"),
    "tess2_reward": read_template("tess2_reward"),
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "marked": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content | trim }}{% endif %}{% endfor %}",
    "everything": "{%- set ns = namespace(last='', n=0) %}{% macro part(m, sep=': ') %}{{ m.role ~ sep }}"
    "{% if m.content is string %}{{ m.content.split('\n')[0].strip().replace('i', 'ii')|indent(2) }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call|tojson(indent=2) }}{{ '%s=%03d' % (call.name, loop.index) }}"
    "{{ '{}-{:>4}'.format(call.name, loop.index) }}{% endfor %}{{ m.reasoning_content or '' }}{% endmacro %}"
    "{% for m in messages[::-1] if m.role != 'system' %}{% if loop.first %}{% set ns.last = m.role %}{% endif %}"
    "{% set ns.n = ns.n + m.content|default('')|length * 2 ** 3 % 7 %}{{ part(m) }}{{ loop.last }}{{ loop.length }}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}{{ ns.last }}{{ ns.n }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(', ') }}"
    "{{ dict(a=1)|items|list }}{{ {'k': [1, (2, 3)]}['k'] }}{{ date_string }}{% set x %}{{ 'b'|center(5) }}{% endset %}"
    "{{ x }}{{ range(3)|sum }}{{ '=' * 5 }}{{ [0] * 2 }}{{ messages[0].nothing is defined }}",
}


@pytest.mark.parametrize("asks", [False, True], ids=["whole", "asking"])
@pytest.mark.parametrize("messages", [ASKED, CONVERSATION, TOOLED], ids=["asked", "conversation", "tooled"])
@pytest.mark.parametrize("template", WORKING.values(), ids=WORKING)
def test_a_template_renders_as_in_transformers(template, messages, asks):
    turns = [{name: value for name, value in turn.items() if value is not None} for turn in messages]
    for turn in turns:
        if "reasoning" in turn:
            turn["reasoning_content"] = turn["reasoning"]  # the older releases do not do it themselves
    try:
        texts, spans = render_jinja_template(
            [turns],
            chat_template=template,
            add_generation_prompt=asks,
            return_assistant_tokens_mask=True,
            date_string=TEMPLATE_DATE,
            **VARIABLES,
        )
    except Exception:
        with pytest.raises(DataError, match="cannot render this conversation"):
            render(template, messages, VARIABLES, add_generation_prompt=asks)
    else:
        assert render(template, messages, VARIABLES, add_generation_prompt=asks) == (texts[0], spans[0])


NESTED = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
DOUBLING = "{%% set ns = namespace(s=%s) %%}{%% for i in range(80) %%}{%% set ns.s = %s %%}{%% endfor %%}{{ ns.s%s }}"
HOSTILE = {
    "raises": ("{{ raise_exception('no system here') }}", "no system here"),
    "security": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "undefined": ("{{ a.b.c }}", "UndefinedError: 'a' is undefined"),
    "concatenated parts": ("{{ 'a' + messages[0] }}", "TypeError"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "another file": ("{% include 'a' %}", "no loader"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "deep": ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "RecursionError"),
    "many blocks": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
    "loops": (NESTED, "more than 0.2 seconds"),
    "writing loops": (NESTED.replace("{% endfor %}", "x{% endfor %}", 1), "more than 0.2 seconds"),
    "loop conditions": (
        "{% for a in range(100000) %}{% for b in range(100000) if b < 0 %}{% endfor %}{% endfor %}",
        "more than 0.2 seconds",
    ),
    "loops of filters": (
        "{% set r = range(100000)|list %}{{ range(100000)|select('in', r)|list|length }}",
        "more than 0.2 seconds",
    ),
    "loops that call themselves": (
        "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
        "more than 0.2 seconds",
    ),
    "macros that call themselves": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "more than 0.2 seconds",
    ),
    "doubling by ~": (DOUBLING % ("'ab'", "ns.s ~ ns.s", ""), "more than"),
    "doubling by +": (DOUBLING % ("'ab'", "ns.s + ns.s", ""), "more than"),
    "doubling lists": (DOUBLING % ("[1]", "[ns.s, ns.s]", ""), "more than"),
    "doubling dictionaries": (DOUBLING % ("[1]", "{'a': ns.s, 'b': ns.s}", "|tojson"), "more than"),
    "doubling namespaces": (DOUBLING % ("1", "namespace(a=ns.s, b=ns.s)", "|string"), "more than"),
    "squaring": (DOUBLING % ("12345", "ns.s * ns.s", ""), "more than"),
    "a namespace in itself": ("{% set n = namespace() %}{% set n.a = n %}{{ n }}", "more than"),
    "powers": ("{{ 9 ** (9 ** 9) }}", "more than"),
    "lists": ("{{ 1000000000 * ['a'] }}", "more than"),
    "texts": ("{{ 'a' * 1000000000000 }}", "more than"),
    "padding": ("{{ 'a'.ljust(1000000000) }}", "more than"),
    "padding filters": ("{{ 'a'|center(1000000000) }}", "more than"),
    "widths": ("{{ '%999999999d' % 1 }}", "more than"),
    "widths of arguments": ("{{ '%*d' % (999999999, 1) }}", "widths of a format"),
    "widths of format": ("{{ '{:999999999}'.format(1) }}", "more than"),
    "widths inside widths": ("{{ '{:{w}}'.format(1, w=999999999) }}", "widths of a format"),
    "repeated fields": ("{{ ('{0}' * 100000).format('a' * 100000) }}", "more than"),
    "replacing": ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "more than"),
    "replacing filters": ("{{ ('a' * 100000)|replace('a', 'b' * 100000) }}", "more than"),
    "joining": ("{{ ('b' * 1000000).join(range(100)|map('string')) }}", "more than"),
    "joining filters": ("{{ range(100)|map('string')|join('b' * 1000000) }}", "more than"),
    "filters on filters": ("{{ range(100000)|map('center', 100000)|list|length }}", "more than"),
    "summing lists": ("{{ ([[1]] * 100000)|sum(start=[])|length }}", "more than"),
    "blocks": ("{% set x %}{% for i in range(900) %}{{ 'a' * 500000 }}{% endfor %}{% endset %}{{ x }}", "more than"),
    "output": ("{% for i in range(900) %}{{ 'a' * 500000 }}{% endfor %}", "more than"),
    "filler": ("{{ lipsum(1000000) }}", "'lipsum' is undefined"),
    "half a character": ("a{{ '\ud800' }}", "half of a character"),
}


@pytest.mark.parametrize(("template", "words"), HOSTILE.values(), ids=HOSTILE)
def test_whatever_a_template_does_ends_soon_and_in_one_line_of_ours(monkeypatch, template, words):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    start = time.thread_time()
    with pytest.raises(DataError, match=words) as caught:
        render(template, CONVERSATION, VARIABLES)
    assert time.thread_time() - start < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_template_prints_the_same_date_on_every_day():
    for template in ("{{ date_string }}", "{{ strftime_now('%d %b %Y') }}"):
        assert render(template, ASKED, {})[0] == TEMPLATE_DATE


def test_a_long_conversation_is_no_hostile_one():
    turns = [turn for i in range(2000) for turn in (*ASKED, {"role": "assistant", "content": f"{i} " * 200})]
    text, spans = render(WORKING["marked"], turns, VARIABLES)
    assert len(spans) == 2000
    assert all(text[start:end].endswith("</s>") for start, end in spans)


def test_threads_render_as_one_does():
    def one(i):
        turns = [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x" * i}] * 3
        return render(WORKING["marked"], turns, VARIABLES)

    alone = [one(i) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(64))) == alone


def test_a_refused_template_does_not_spend_the_time_of_the_next_in_its_thread(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    found = []

    def work():
        for template in (NESTED, WORKING["chatml"], NESTED, WORKING["chatml"]):
            try:
                found.append(render(template, ASKED, {})[0])
            except DataError:
                found.append(None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [text is None for text in found] == [True, False, True, False]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], r"\[\] is not a conversation. Give a non-empty list of turns"),
        (None, "None is not a conversation"),
        ({"role": "user", "content": "a"}, "is not a conversation"),
        (["a"], "turn 0 makes it not a conversation, got 'a'"),
        ([*ASKED, {"role": "user"}], "turn 1 makes it not a conversation"),
        ([{"tool_calls": [1]}], "turn 0 makes it not a conversation"),
        ([{"role": 1, "content": "a"}], "turn 0 has the role 1"),
        ([*ASKED, {"role": "user", "content": None}], "turn 1 of role 'user' has the content None"),
        ([{"role": "user", "content": 5}], "turn 0 of role 'user' has the content 5"),
    ],
)
def test_what_is_no_conversation_is_named_by_turn_and_field(messages, words):
    with pytest.raises(DataError, match=words):
        check_conversation(messages)


def test_tool_calls_may_stand_in_place_of_content():
    bare = [{name: value for name, value in turn.items() if value is not None} for turn in TOOLED]
    assert "content" not in bare[1]
    for messages in (TOOLED, bare):
        assert check_conversation(messages) is messages
    assert render(WORKING["everything"], bare, VARIABLES) == render(WORKING["everything"], TOOLED, VARIABLES)


PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]


def test_a_list_of_parts_is_read_by_the_templates_that_know_parts_and_never_printed_as_python():
    knows = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    assert render(knows, PARTS, {})[0] == "Hi"
    with pytest.raises(
        DataError, match=r"content of turn 0, a list of parts, as it stands.*Give the content as one text"
    ):
        render("{% for m in messages %}{{ m.content }}{% endfor %}", PARTS, {})


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a\ud800b", r"the text has half of a character, '\\ud800', at position 1, behind 'a'"),
        ([{"role": "user", "content": "\udfff"}], "half of a character"),
        ([], "is not a conversation"),
        (PARTS, "a list of parts"),
        ([{"role": "user", "content": None}], "has the content None"),
        ([{"role": "system", "content": "a"}], "no system"),
    ],
)
def test_a_prompt_that_cannot_be_rendered_is_named(tiny_tokenizer, prompt, words):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=f"^Prompt 1: .*{words}"):
        encode_prompts(tiny_tokenizer(), ["a", prompt], template)
    with pytest.raises(ConfigError, match=f"^mine.jsonl:7: .*{words}"):
        encode_prompts(tiny_tokenizer(), ["a", prompt], template, names=["b", "mine.jsonl:7"])


@pytest.mark.parametrize("text", ["", "\U0001f600", "\u2028\ufeff\x00"])
def test_whole_characters_are_let_through(text):
    assert check_text(text) == text


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None], ids=["bytes", "folder"])
def test_a_template_that_is_no_text_is_named(tmp_path, content):
    path = tmp_path / "chat.jinja"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=r"data.chat_template.*chat.jinja"):
        read_template(str(path))


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path):
    path = Path(tmp_path / "chat.jinja")
    path.write_text("{{ messages }}", encoding="utf-8-sig")
    assert read_template(str(path)) == "{{ messages }}"
