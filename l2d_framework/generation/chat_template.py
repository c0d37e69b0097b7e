"""Conversations rendered by chat templates, which are programs of strangers: in a sandbox, within bounds, one error."""

from __future__ import annotations

import ast
import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from types import CodeType, MappingProxyType
from typing import Any

from jinja2 import Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils.chat_template_utils import _compile_jinja_template

from l2d_framework.errors import DataError, shown

TEMPLATE_DATE = "26 Jul 2024"
"""Date shown to chat templates that print one; fixed, so that training on another day gives the same tokens."""
_TODAY = datetime(2024, 7, 26)
SECONDS = 10.0
"""Longest time one rendering may compute; time of its own thread, so that a busy machine refuses nothing."""
LONGEST = 10_000_000
"""Most characters of a rendered conversation and of any value that a template makes on the way."""

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]

_REASONING = ("reasoning_content", "thinking", "reasoning")
_GROWING = frozenset(
    {"*", "batch", "center", "expandtabs", "indent", "ljust", "pprint", "rjust", "round", "slice", "striptags", "sum"}
    | {"to_bytes", "tojson", "translate", "urlize", "wordwrap", "zfill"}
)
"""Operations whose result may be as large as the product of what they are given."""
_SPEC = re.compile(r"%[-+ #0-9.*]*|\{[\w.\[\]]*(?:![rsa])?:[^{}]*\{?")
_POWER = 2**16
_PART = 16


class _TooMuchError(Exception):
    """A template wants more time or space than it gets."""


def check_conversation(messages: Any) -> Messages:
    """Refuse what is no conversation, whatever template would render it."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise DataError(
            f"{shown(messages)} is not a conversation. Give a non-empty list of turns with `role` and `content`."
        )
    for number, turn in enumerate(messages):
        calls = isinstance(turn, Mapping) and (turn.get("tool_calls") or turn.get("function_call"))
        if not isinstance(turn, Mapping) or "role" not in turn or not (calls or "content" in turn):
            raise DataError(
                f"turn {number} makes it not a conversation, got {shown(turn)}. Give it `role` and `content`."
            )
        if not isinstance(turn["role"], str):
            raise DataError(f"turn {number} has the role {shown(turn['role'])}. Give a text such as 'user'.")
        content = turn.get("content")
        if not isinstance(content, str | list) and not (content is None and calls):
            raise DataError(
                f"turn {number} of role {turn['role']!r} has the content {shown(content)}. Give a text, or leave the "
                "turn out."
            )
    return messages


def check_text(text: str) -> str:
    """Refuse a text that no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has half of a character, {text[error.start]!r}, at position {error.start}, behind "
            f"{text[max(0, error.start - 20) : error.start]!r}. Write the whole character, or remove it."
        ) from error
    return text


def render(
    template: str,
    messages: Messages,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> tuple[str, Spans]:
    """Text of a conversation, the same as of transformers' `apply_chat_template`.

    Args:
        template: jinja source.
        messages: turns with `role` and `content`; fields that are None are left out, as templates expect.
        variables: what else the template can read, such as the special tokens; the date is `TEMPLATE_DATE` if unset.
        add_generation_prompt: whether to end with what introduces an answer.

    Returns:
        (the text, start and end of each of its parts between generation markers).

    Raises:
        DataError: whatever goes wrong inside, in one line, and if it takes more than `SECONDS` or `LONGEST`.
    """
    pieces: list[str] = []
    spans: Spans = []
    try:
        turns = [_turn(turn) for turn in messages]
        compiled = _compiled(template, threading.get_ident())
        environment: Any = compiled.environment
        environment.start()
        environment.weighed(turns)
        with environment.activate_tracker(pieces, spans):
            values = {"date_string": TEMPLATE_DATE, **variables}
            made = compiled.generate(
                **values, messages=turns, tools=None, documents=None, add_generation_prompt=add_generation_prompt
            )
            for piece in made:
                environment.tick(len(piece))
                pieces.append(piece)
    # Templates raise whatever Python can raise.
    except Exception as error:
        kind = "" if isinstance(error, _TooMuchError) else f"{type(error).__name__}: "
        what = " ".join(str(error)[:300].split()).rstrip(".") or "nothing more is known"
        raise DataError(
            f"the chat template cannot render this conversation: {kind}{what}. Change the turns to what the template "
            "expects, or the template."
        ) from error
    text = "".join(pieces)
    for number, turn in enumerate(turns):
        if isinstance(turn.get("content"), list) and str(turn["content"]) in text:
            raise DataError(
                f"the chat template writes the content of turn {number}, a list of parts, as it stands: "
                f"{shown(turn['content'])}. Give the content as one text."
            )
    return check_text(text), spans


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    # Copied through JSON, so that a template meets no object with methods of its own.
    found: dict[str, Any] = json.loads(json.dumps({k: v for k, v in turn.items() if v is not None}, default=str))
    # As transformers does: the model's reasoning goes by several names.
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


_COMPILING = threading.Lock()


@functools.lru_cache(maxsize=64)
def _compiled(template: str, thread: int) -> Template:
    # One for each thread: the tracker of generation markers and the clock are the environment's.
    if len(template) > LONGEST // 10:
        raise _TooMuchError(f"the template has {len(template):,} characters")
    # Python's trees of code may be made by one thread at a time only.
    with _COMPILING:
        return _Bounded().from_string(template)


class _Bounded(ImmutableSandboxedEnvironment):
    """transformers' environment of chat templates that looks at the clock in every loop, macro, call and filter.

    A single operation cannot be interrupted, so none is begun whose result would be large.
    """

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        theirs = _compile_jinja_template("").environment
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            finalize=self.weighed,
        )
        # Filler text in any amount is the one function whose size its arguments do not bound.
        self.globals = {name: made for name, made in theirs.globals.items() if name != "lipsum"}
        self.globals["strftime_now"] = _TODAY.strftime
        self.filters = {name: self._guarded(name, made) for name, made in theirs.filters.items()}
        self.tests = {name: self._guarded(name, made) for name, made in theirs.tests.items()}
        self.concat: Any = self._concat
        self.start()

    def start(self) -> None:
        self._end, self._length, self._made = time.thread_time() + SECONDS, 0, 0

    def tick(self, length: int = 0) -> None:
        self._length += length
        if self._length > LONGEST:
            raise _TooMuchError(f"it writes more than {LONGEST:,} characters")
        if time.thread_time() > self._end:
            raise _TooMuchError(f"it computes for more than {SECONDS:g} seconds")

    def weighed(self, value: Any) -> Any:
        _require(_weight(value))
        # Filters that go through a range make values that are kept together before the whole is seen.
        self._made += len(value) if isinstance(value, Sized) else 0
        _require(self._made, most=20 * LONGEST)
        return value

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)
        name, own = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        args = self._before(name, own, args, kwargs)
        return self.weighed(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _require(_weight(left) + _weight(right))
        elif operator == "%" and isinstance(left, str):
            self._before("format", left, (right,))
        elif operator == "*" and not isinstance(left, int | float):
            self._before("*", left, (right,))
        elif operator == "*" and not isinstance(right, int | float):
            self._before("*", right, (left,))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require(left.bit_length() * abs(right), most=_POWER)
        return self.weighed(super().call_binop(context, operator, left, right))

    def _compile(self, source: str, filename: str) -> CodeType:
        tree: Any = _Clocked().visit(ast.parse(source, filename))
        return compile(ast.fix_missing_locations(tree), filename, "exec")

    def _concat(self, pieces: Iterable[str]) -> str:
        found = list(pieces)
        _require(sum(map(len, found)))
        return "".join(found)

    def _guarded(self, name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        # jinja passes some functions its own state first, then the value.
        first = int(hasattr(made, "jinja_pass_arg"))

        @functools.wraps(made)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            own, *others = args[first:]
            own, *others = self._before(name, None, (own, *others), kwargs)
            return self.weighed(made(*args[:first], own, *others, **kwargs))

        return guarded

    def _before(
        self, name: str, own: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[Any, ...]:
        # Looks at the clock and refuses what would make a large value. What gives values one by one has no size yet.
        self.tick()
        if name not in _GROWING | {"format", "format_map", "join", "replace"}:
            return args
        args = tuple(list(each) if isinstance(each, Iterator) else each for each in args)
        given = [each for each in (own, *args, *kwargs.values()) if each is not None]
        if name == "join":
            _require(math.prod(len(each) for each in given if isinstance(each, Sized)))
        elif name == "replace":
            text, old, new = [*(each for each in given if isinstance(each, str)), "", "", ""][:3]
            _require(len(text) + (text.count(old) + 1) * len(new))
        elif name in _GROWING:
            sizes = [_weight(given[0]), *(abs(e) if isinstance(e, int) else _weight(e) for e in given[1:])]
            if name == "sum" and any(isinstance(each, list | tuple) for each in given[1:]):
                sizes.append(sizes[0])  # each addition copies what there is
            _require(math.prod(max(1, size) for size in sizes))
        else:
            specs = _SPEC.findall(str(given[0]))
            if any(spec.endswith("{") or (spec[0] == "%" and "*" in spec) for spec in specs):
                raise _TooMuchError("widths of a format must stand in it")
            widths = [int(width[:9]) for spec in specs for width in re.findall(r"\d+", spec)]
            _require((str(given[0]).count("{") + len(specs)) * max([1, *widths, *map(_weight, given[1:])]))
        return args


class _Clocked(ast.NodeTransformer):
    """Rewrites compiled templates: loops and functions look at the clock, what displays and sets make is weighed."""

    def visit(self, node: ast.AST) -> ast.AST:
        node = self.generic_visit(node)
        if isinstance(node, ast.For | ast.While | ast.FunctionDef):
            node.body.insert(0, ast.Expr(_asked("tick")))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            node.value = _asked("weighed", node.value)
        if isinstance(node, ast.Dict) or (isinstance(node, ast.List | ast.Tuple) and isinstance(node.ctx, ast.Load)):
            return _asked("weighed", node)
        return node


def _asked(method: str, *args: ast.expr) -> ast.Call:
    name = ast.Name("environment", ast.Load())
    return ast.Call(ast.Attribute(name, method, ast.Load()), list(args), [])


def _weight(value: Any) -> int:
    # About the length of `repr`, in which a part counts as often as it occurs; no more than needed of what is too long.
    if isinstance(value, str):  # nearly all of what templates make
        return 1 + len(value)
    total, waiting = 1, [value]
    while waiting and total <= LONGEST:
        one = waiting.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, int):
            # Arithmetic of long numbers takes more than linear time.
            total += 1000 * (one.bit_length() // 64)
        elif isinstance(one, Namespace):
            total += _PART
            waiting.append(one._Namespace__attrs)
        elif isinstance(one, range | list | tuple | set | frozenset | dict):
            # Parts are looked at one by one, which takes its time.
            total += _PART * len(one)
            if total <= LONGEST and not isinstance(one, range):
                waiting += [*one, *one.values()] if isinstance(one, dict) else one
    return total


def _require(size: int, most: int | None = None) -> None:
    most = LONGEST if most is None else most
    if size > most:
        raise _TooMuchError(f"it makes a value of more than {most:,} characters")
