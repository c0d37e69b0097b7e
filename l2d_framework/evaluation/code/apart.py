"""What runs in the separate processes once they are limited: a program, and its tests in a second process.

Its text is handed to `python -I -S -c`, so it imports nothing but the standard library. Between the two processes go
lines of JSON that hold plain values, each made anew from its parts by the receiver: no code, no pickles. What is no
plain value stays where it is and is known to the other side by a number.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

_CONTAINERS: dict[str, Any] = {
    kind.__name__: kind for kind in (Counter, OrderedDict, dict, list, set, deque, bytearray)
}
"""What may change during a call, and is then changed on the caller's side too; subclasses before their bases."""
_PARTS: dict[str, Any] = {
    "builtins.bytes": lambda value: [list(value)],
    "builtins.complex": lambda value: [value.real, value.imag],
    "builtins.range": lambda value: [value.start, value.stop, value.step],
    "builtins.slice": lambda value: [value.start, value.stop, value.step],
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
    "decimal.Decimal": lambda value: [str(value)],
    "datetime.date": lambda value: [value.year, value.month, value.day],
    "datetime.time": lambda value: [value.hour, value.minute, value.second, value.microsecond, value.tzinfo],
    "datetime.datetime": lambda value: [*value.timetuple()[:6], value.microsecond, value.tzinfo],
    "datetime.timezone": lambda value: [value.utcoffset(None)],
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
}
"""By class, what its constructor makes an equal value of."""
_PLAIN = {type(None), bool, float, str}
_LARGE = 1 << 63
_MODULES = (*sys.stdlib_module_names, "numpy")
_ASKED = ("getattr", "setattr", "iter", "next", "len", "bool", "str", "repr", "hash", "int", "float", "abs", "format")
_CALCULATED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
_BETWEEN = ("eq", "ne", "lt", "le", "gt", "ge", *_CALCULATED)
_SERVED: dict[str, Any] = {
    "call": lambda function, *given, **named: function(*given, **named),
    **{name: getattr(builtins, name) for name in _ASKED},
    "instancecheck": lambda kind, value: isinstance(value, kind),
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "neg", *_BETWEEN)},
}
"""What one process may ask of an object in the other."""


class Handle:
    """Stands for an object of the other process, and asks it; never tells it what it is compared with."""

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __instancecheck__(self, other: Any) -> bool:
        return isinstance(other, Handle) and bool(self._link.ask("instancecheck", self, other))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("getattr", self, name)


def _forward(name: str) -> Any:
    return lambda self, *given, **named: self._link.ask(name, self, *given, **named)


def _between(name: str) -> Any:
    # The other process must not decide whether its object is equal to a value of this one.
    return lambda self, other: self._link.ask(name, self, other) if isinstance(other, Handle) else NotImplemented


for _name in _SERVED:
    if _name not in ("getattr", "instancecheck"):
        setattr(Handle, f"__{_name.strip('_')}__", (_between if _name in _BETWEEN else _forward)(_name))


class _Seen(list[Any]):
    """Containers in the order in which a message mentions them first; later it says their number."""

    def __init__(self, known: Iterable[Any] = ()) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}
        for container in known:
            self.append(container)

    def append(self, container: Any) -> None:
        self.numbers[id(container)] = len(self)
        super().append(container)


class Link:
    """One end of the connection between a program and its tests.

    One that is not trusting lets the other side call functions, step through iterators, and use the public attributes
    of objects of the tests' own classes; else it may ask anything of any object it knows. `gone` is called when the
    other end is closed or says what is no message, and never returns.
    """

    def __init__(self, descriptors: tuple[int, int], *, gone: Callable[[], Any], is_trusting: bool) -> None:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        self._incoming, self._outgoing = os.fdopen(descriptors[0]), os.fdopen(descriptors[1], "w")
        self._gone, self._is_trusting = gone, is_trusting
        self._mine: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._handles: dict[int, Handle] = {}

    def send(self, message: Any) -> None:
        """Write one message."""
        try:
            self._outgoing.write(json.dumps(message) + "\n")
            self._outgoing.flush()
        except BrokenPipeError:
            self._gone()

    def receive(self) -> Any:
        """Read one message."""
        try:
            return json.loads(self._incoming.readline())
        except (ValueError, RecursionError):
            return self._gone()

    def ask(self, what: str, *given: Any, **named: Any) -> Any:
        """Have the other side do something, and serve it meanwhile; containers among the arguments change as there."""
        seen = _Seen()
        self.send([what, self._pack([list(given), named], seen)])
        while (message := self.receive())[0] not in ("gives", "raises"):
            self.serve(*message)
        kind, back, changes = message
        result = self._unpack(back, seen)
        for number, parts in changes:
            _refill(seen[number], self._unpack(parts, seen))
        if kind == "raises":
            error = _error(*result)
            raise error
        return result

    def serve(self, what: str, packed: Any) -> None:
        """Do what the other side asks and send what came of it."""
        seen, asked, known = _Seen(), None, 0
        try:
            given, named = asked = self._unpack(packed, seen)
            known = len(seen)
            if not self._is_trusting and not _is_harmless(what, given):
                raise TypeError(f"{what} is not possible with this object of the tests")
            result = _of_program(*given) if what == "names" else _SERVED[what](*given, **named)
            answer = ["gives", self._pack(result, seen)]
        except BaseException as error:
            seen = _Seen(seen[:known])
            answer = ["raises", self._pack(_description(error), seen)]
        changes = []
        if json.dumps(self._pack(asked, _Seen())) != json.dumps(packed):
            changes = [[n, self._pack(list(_parts(one)), seen)] for n, one in enumerate(seen[:known])]
        self.send([*answer, changes])

    def _pack(self, value: Any, seen: _Seen) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is Handle:
            return ["yours", value._number]
        if id(value) in seen.numbers:
            return ["seen", seen.numbers[id(value)]]
        if (array := _array(value)) is not None:
            if _is_array(value):
                seen.append(value)
            return ["array", *array]
        if isinstance(value, int):
            return int(value) if abs(value) < _LARGE else ["int", hex(value)]
        for base in (float, str):
            if isinstance(value, base):
                return base(value) if base is float else str.__str__(value)
        if kind is defaultdict and _is_builtin(value.default_factory):
            seen.append(value)
            return ["defaultdict", self._packed(_parts(value), seen), self._pack(value.default_factory, seen)]
        for name, container in _CONTAINERS.items():
            if isinstance(value, container):
                seen.append(value)
                return [name, self._packed(_parts(value), seen)]
        for plain in (tuple, frozenset):
            if isinstance(value, plain):
                return [plain.__name__, self._packed(value, seen)]
        if (name := f"{kind.__module__}.{kind.__qualname__}") in _PARTS:
            return ["made", name, self._packed(_PARTS[name](value), seen)]
        if isinstance(value, types.ModuleType) and value.__name__ in _MODULES:
            return ["module", value.__name__]
        if _is_builtin(value):
            return ["type", value.__name__]
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._mine)
            self._mine.append(value)
        return ["mine", self._numbers[id(value)]]

    def _packed(self, parts: Iterable[Any], seen: _Seen) -> list[Any]:
        # Long lists of numbers pass here, so those that need no thought get none.
        return [
            part
            if (kind := type(part)) in _PLAIN or (kind is int and -_LARGE < part < _LARGE)
            else self._pack(part, seen)
            for part in parts
        ]

    def _unpacked(self, parts: list[Any], seen: _Seen) -> list[Any]:
        return [self._unpack(part, seen) if isinstance(part, list) else part for part in parts]

    def _unpack(self, packed: Any, seen: _Seen) -> Any:
        if not isinstance(packed, list):
            return packed
        tag, first, *more = packed
        if tag in _CONTAINERS or tag == "defaultdict":
            made = defaultdict() if tag == "defaultdict" else _CONTAINERS[tag]()
            seen.append(made)
            _refill(made, self._unpacked(first, seen))
            if tag == "defaultdict":
                made.default_factory = self._unpack(more[0], seen)
            return made
        if tag in ("tuple", "frozenset"):
            return getattr(builtins, tag)(self._unpacked(first, seen))
        if tag == "made":
            if first not in _PARTS:
                raise TypeError(f"no value of {first}")
            module, _, name = first.rpartition(".")
            return getattr(importlib.import_module(module), name)(*self._unpacked(more[0], seen))
        if tag == "array":
            made = _from_array(first, *more)
            if _is_array(made):
                seen.append(made)
            return made
        if tag == "module" and first in _MODULES:
            return importlib.import_module(first)
        if tag == "type" and isinstance(getattr(builtins, first, None), type):
            return getattr(builtins, first)
        if tag == "mine":
            return self._handles.setdefault(first, Handle(self, first))
        if tag == "int":
            return int(first, 16)
        return {"seen": seen, "yours": self._mine}[tag][first]


def _is_builtin(value: Any) -> bool:
    return isinstance(value, type) and getattr(builtins, value.__name__, None) is value


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _parts(container: Any) -> Iterable[Any]:
    if _is_array(container):
        return [container.copy()]
    return container.items() if isinstance(container, dict) else container


def _refill(container: Any, parts: list[Any]) -> None:
    if _is_array(container):
        if container.flags.writeable:
            container[...] = parts[0]
        return
    if isinstance(container, list | bytearray):
        container[:] = parts
        return
    container.clear()
    if isinstance(container, dict):
        for key, value in parts:
            container[key] = value
    else:
        getattr(container, "extend" if isinstance(container, deque) else "update")(parts)


def _array(value: Any) -> list[Any] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray | numpy.generic) or value.dtype.kind not in "biufcSUMm":
        return None
    return [value.dtype.str, value.tobytes().hex(), list(value.shape), isinstance(value, numpy.generic)]


def _from_array(kind: str, content: str, shape: list[int], is_scalar: bool) -> Any:
    import numpy

    made = numpy.frombuffer(bytearray.fromhex(content), numpy.dtype(kind)).reshape(shape)
    return made[()] if is_scalar else made


def _description(error: BaseException) -> tuple[str, str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    base = next(name for name in kinds if isinstance(getattr(builtins, name, None), type))
    return kinds[0], base, tuple(error.args) if kinds[0] == base else (_text(error),)


def _error(name: str, base: str, given: Any) -> BaseException:
    kind = getattr(builtins, base)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise TypeError(f"{base} is no exception")
    made: BaseException = (kind if name == base else type(name, (kind,), {}))(*given)
    return made


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""


def _is_harmless(what: str, given: Any) -> bool:
    target, *more = given
    if what == "call":
        functions = types.FunctionType, types.MethodType, types.BuiltinFunctionType
        return isinstance(target, functions) or getattr(target, "__module__", None) == "tests"
    if what in ("getattr", "setattr"):
        return type(target).__module__ == "tests" and isinstance(more[0], str) and not more[0].startswith("_")
    return what in _SERVED


def _of_program(names: list[str]) -> dict[str, Any]:
    known = sys.modules["program"].__dict__
    return {name: known[name] for name in names if name in known}


def _executed(code: Any, name: str, names: dict[str, Any]) -> str:
    """Execute code as a module; what went wrong, or nothing."""
    module = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    try:
        # Otherwise the future statements of this file would hold for the code, too.
        exec(compile(code, name, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"[:500]
    return ""


def alone(job: int, channel: int) -> None:
    """Execute a program with its tests in this process and say so only when its last line has run."""
    write, leave = os.write, os._exit
    with open(job, "rb") as file:
        task = json.load(file)
    failure = _executed(task.pop("program"), "program", {})
    write(channel, (failure or task["token"]).encode(errors="replace"))
    leave(0)


def program(incoming: int, outgoing: int) -> None:
    """Execute a program, then do what its tests ask of its values."""
    link = Link((incoming, outgoing), gone=lambda: os._exit(0), is_trusting=True)
    link.send(_executed(link.receive(), "program", {}))
    while True:
        link.serve(*link.receive())


def tests(job: int, channel: int, incoming: int, outgoing: int) -> None:
    """Have a program executed in the other process, run its tests in this one, and say how they ended."""

    def answer(text: str = "failed: it ended before its last line had run") -> None:
        os.write(channel, text.encode(errors="replace"))
        os._exit(0)

    with open(job, "rb") as file:
        task = json.load(file)
    if sys.platform == "linux" and not task["is_isolated"]:
        import ctypes

        # Not dumpable (PR_SET_DUMPABLE): the program runs as the same user, and starts only below.
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
    link = Link((incoming, outgoing), gone=answer, is_trusting=False)
    link.send(task["program"])
    if failure := link.receive():
        answer(str(failure))
    try:
        import ast  # the program's process can do without

        tree: Any = ast.parse(task["tests"])
        mentioned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        attributes = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        bases = {node.id for node in attributes if isinstance(node, ast.Name)}
        names = _names(mentioned, bases, link)
    except BaseException as error:
        answer(f"failed: {type(error).__name__}: {error}"[:500])
    answer(_executed(tree, "tests", names) or task["token"])


def _names(mentioned: set[str], bases: set[str], link: Link) -> dict[str, Any]:
    """What of the program's names the tests mention; it may not replace what they take for granted."""
    given = link.ask("names", sorted(mentioned))
    names = {name: given[name] for name in mentioned if name in given and not name.startswith("__")}
    # A program is tested under the name of a built-in function only where no other name of it is tested.
    names = {name: value for name, value in names.items() if not hasattr(builtins, name)} or names
    return names | {name: importlib.import_module(name) for name in bases & names.keys() & {*_MODULES}}


if __name__ == "__main__":
    sys.path.append(sys.argv[2])
    roles: dict[str, Callable[..., None]] = {"alone": alone, "program": program, "tests": tests}
    roles[sys.argv[1]](*map(int, sys.argv[3:]))
