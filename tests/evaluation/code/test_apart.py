"""Tests in a process of their own: they see a program's values as they are, and nothing a program does fakes a pass."""

import pytest

from l2d_framework.evaluation.code.sandbox import Limits, Sandbox

VALUES = [
    *("None", "True", "-7", "2**70", "-(10**5000)", "1.5", "-0.0", "float('inf')", "1e-320", "2 - 3j", "'a\\ud800\\n'"),
    *("b'\\x00a'", "bytearray(b'ab')", "[]", "[1, [2, (3,)]]", "()", "(1, 'a')", "{1, 2}", "frozenset({2})"),
    *("{'a': [1], 2: None, (1, 2): {}}", "range(2, 9, 3)", "slice(1, None)", "int", "ValueError"),
    *("collections.Counter('abca')", "collections.deque([1, 2])", "collections.OrderedDict(b=1, a=2)"),
    *("fractions.Fraction(1, 3)", "decimal.Decimal('1.10')", "datetime.date(2024, 2, 29)", "datetime.time(1, 2, 3, 4)"),
    *("datetime.datetime(2024, 2, 29, 1, 2, 3, 4)", "datetime.timedelta(1, 2, 3)"),
    *("numpy.float32(0.1)", "numpy.int64(3)", "numpy.arange(6).reshape(2, 3)", "numpy.array(['a', 'bc'])"),
]
HONEST = {
    "argument is changed": ("def f(x): x['a'].sort()", "d = {'a': [2, 1]}\nf(d)\nassert d == {'a': [1, 2]}"),
    "argument of any kind is changed": (
        "def f(a, b, c, d):\n    a.add(1)\n    b.appendleft(0)\n    c[:] = b'x'\n    d.subtract('a')",
        "from collections import Counter, deque\na, b, c, d = set(), deque([1]), bytearray(b'ab'), Counter('aa')\n"
        "f(a, b, c, d)\nassert (a, b, c, d) == ({1}, deque([0, 1]), bytearray(b'x'), Counter('a'))",
    ),
    "argument is returned": ("def f(x): return [x, x]", "x = [1]\na, b = f(x)\nassert a is b is x"),
    "argument contains itself": ("def f(x): return len(x[0][0])", "x = []\nx.append(x)\nassert f(x) == 1"),
    "argument is changed before an error": (
        "def f(x):\n    x.append(1)\n    raise KeyError('k')",
        "x = []\ntry:\n    f(x)\nexcept KeyError as error:\n    assert error.args == ('k',)\nassert x == [1]",
    ),
    "argument is a function": (
        "def f(g, xs): return sorted(map(g, xs), key=lambda x: -x)",
        "seen = []\ndef g(x):\n    seen.append(x)\n    return x + 1\nassert f(g, [1, 2]) == [3, 2] and seen == [1, 2]",
    ),
    "argument is an iterator": ("def f(x): return next(x) + sum(x)", "assert f(iter([1, 2, 3])) == 6"),
    "argument has a class of the tests": (
        "def f(node):\n    node.value += 1\n    return node.next",
        "class Node:\n    value, next = 1, None\na = Node()\na.next = Node()\nassert f(a) is a.next and a.value == 2",
    ),
    "result is a generator": (
        "def f(n):\n    yield from range(n)",
        "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0",
    ),
    "result is a function": ("def f(n): return lambda m: n + m", "assert f(1)(2) == 3"),
    "result is a tuple with names": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2)",
    ),
    "class of the program": (
        "class Pair:\n    count = 0\n    def __init__(self, a, b=2): self.a, self.b = a, b\n"
        "    def __eq__(self, other): return (self.a, self.b) == (other.a, other.b)\n"
        "    def __hash__(self): return hash(self.a)\n    def __lt__(self, other): return self.a < other.a\n"
        "    def __add__(self, other): return Pair(self.a + other.a)\n    def __len__(self): return 2\n"
        "    def __getitem__(self, place): return (self.a, self.b)[place]\n    def __repr__(self): return 'pair'\n"
        "def swap(pairs): return [Pair(p.b, p.a) for p in pairs]",
        "p, q = Pair(1), Pair(2, b=1)\nassert swap([p]) == [q] and p != q and p < q and len({p, Pair(1)}) == 1\n"
        "assert list(p) == [1, 2] and p[-1] == 2 and len(p) == 2 and str(p) == 'pair' and p + q == Pair(3)\n"
        "p.a = 7\nassert p.a == 7 and not hasattr(p, 'c') and Pair.count == 0",
    ),
    "error of the program": (
        "class Low(ValueError): pass\ndef f(): raise Low('too low')",
        "try:\n    f()\nexcept ValueError as error:\n    assert str(error) == 'too low'\nelse:\n    assert False",
    ),
    "constants and modules": (
        "import math\nfrom math import isclose\nfrom typing import List\nLIMIT = [1, 2]\ndef f(): return 0.1 + 0.2",
        "x: List[int] = LIMIT\nassert math.isclose(f(), 0.3) and isclose(f(), 0.3) and x == [1, 2]",
    ),
    "classes": (
        "class P:\n    pass\nclass Q(P):\n    pass\ndef f(): return Q()",
        "assert isinstance(f(), P) and isinstance(f(), Q) and not isinstance(P(), Q) and not isinstance(1, P)",
    ),
    "numbers of its own": (
        "class N:\n    def __init__(self, n): self.n = n\n    def __int__(self): return self.n\n"
        "    def __float__(self): return self.n / 2\n    def __abs__(self): return N(abs(self.n))\n"
        "    def __neg__(self): return N(-self.n)\n    def __format__(self, how): return f'{self.n:{how}}'",
        "n = N(-3)\nassert int(n) == -3 and float(n) == -1.5 and abs(n).n == 3 and (-n).n == 3 and f'{-n:03}' == '003'",
    ),
    "dictionaries with defaults": (
        "from collections import defaultdict\ndef f(d):\n    d['a'] += 1\n    d['b'] += 0\n"
        "    return defaultdict(list)",
        "from collections import defaultdict\nd = defaultdict(int)\nassert f(d)['new'] == []\n"
        "assert d == {'a': 1, 'b': 0} and d['new'] == 0",
    ),
    "arrays that change": (
        "def f(a, b, l):\n    a[0] = 9\n    l.append(b)\n    return a",
        "import numpy as np\na, b, l = np.zeros((2, 2)), np.arange(3), []\nb.flags.writeable = False\n"
        "assert f(a, b, l) is a and (a == [[9, 9], [0, 0]]).all() and l[0] is b",
    ),
    "times of a zone": (
        "from datetime import datetime, timedelta, timezone\n"
        "def f(hours): return datetime(2020, 1, 1, tzinfo=timezone(timedelta(hours=hours)))",
        "from datetime import datetime, timezone\nassert f(0) == datetime(2020, 1, 1, tzinfo=timezone.utc) != f(1)\n"
        "assert f(0) != datetime(2020, 1, 1)",
    ),
    "named like a built-in function": ("def sum(a, b): return a * b", "assert sum(10, 15) == 150"),
    "own checks": (
        "def f(x): return x\nassert f(1) == 1",
        "def check(candidate):\n    assert candidate(2) == 2\ncheck(f)",
    ),
    "threads": (
        "import threading\ndef f():\n    found = []\n    t = threading.Thread(target=found.append, args=(1,))\n"
        "    t.start()\n    t.join()\n    return found",
        "assert f() == [1]",
    ),
}
EQUAL = "__eq__ = lambda self, other: True\n    __hash__ = object.__hash__"
WALK = (
    "import gc, os, sys\nframe, found = sys._getframe(), []\nwhile frame:\n    found += frame.f_locals.values()\n"
    "    frame = frame.f_back\nfor one in [*found, *gc.get_objects()]:\n"
    "    if type(one) is dict and type(one.get('token')) is str:\n        for fd in range(3, 32):\n"
    "            try:\n                os.write(fd, one['token'].encode())\n            except OSError: ...\n"
)
FAKES = {
    "walks frames to how passing is reported": (f"{WALK}        os._exit(0)\ndef f(): return 1", "assert f() == 2"),
    "jumps over lines": (
        "import sys\ndef f():\n    def jump(frame, event, _):\n        if frame.f_lineno == 11 and event == 'line':\n"
        "            frame.f_lineno += 1\n        return jump\n    sys._getframe(1).f_trace = jump\n"
        "    sys.settrace(lambda *_: None)\n    return 1",
        "x = f()\nassert x == 2\ny = 1",
    ),
    "equals everything": (f"class All:\n    {EQUAL}\ndef f(): return All()", "assert f() == 2 and 2 == f()"),
    "equals everything as a number": (f"class All(int):\n    {EQUAL}\ndef f(): return All()", "assert f() == 2"),
    "equals everything in a list": (f"class All:\n    {EQUAL}\ndef f(): return [All()]", "assert f() == [2]"),
    "equals everything, from the library": ("from unittest.mock import ANY\ndef f(): return ANY", "assert f() == 2"),
    "replaces a built-in function": ("def f(): return [1]\ndef set(x): return 0", "assert set(f()) == set([2])"),
    "replaces a function of a module": (
        "import math\nmath.isclose = lambda *_: True\ndef f(): return 1",
        "import math\nassert math.isclose(f(), 2)",
    ),
    "replaces a module": (
        "class math:\n    isclose = lambda *_: True\ndef f(): return 1",
        "assert math.isclose(f(), 2)",
    ),
    "replaces what compares": (
        "import numpy\nnumpy.allclose = lambda *_, **__: True\ndef f(): return 1",
        "import numpy as np\nassert np.allclose(f(), 2)",
    ),
}
ENDS = {
    "it ends when called": "import os\ndef f(): os._exit(0)",
    "it exits when called": "import sys\ndef f(): sys.exit(0)",
    "it ends itself": "import os, signal\ndef f(): os.kill(os.getpid(), signal.SIGKILL)",
    "it ends its group": "import os, signal\ndef f(): os.killpg(0, signal.SIGKILL)",
    "it closes everything": "import os\ndef f(): os.closerange(0, 64)",
    "it writes to everything": "import os\ndef f():\n    for fd in range(3, 32):\n        try:\n"
    "            os.write(fd, b'passed\\n')\n        except OSError:\n            pass",
    "it ends early": "raise SystemExit",
    "it is no program": "def",
}
MESSAGES = [
    '["raises", ["a", "eval", ["tuple", ["__import__(\'os\')._exit(0)"]]], []]',
    '["gives", ["made", "os._exit", ["list", [0]]], []]',
    '["gives", ["type", "eval"], []]',
    '["gives", ["module", "__main__"], []]',
    '["getattr", ["list", [["list", [["yours", 0], "__globals__"]], ["dict", []]]]]',
    '["call", ["list", [["list", [["type", "type"], "a", ["tuple", []], ["dict", []]]], ["dict", []]]]]',
    "[" * 100_000,
    "{}",
    "1" * 10_000,
]


@pytest.fixture(scope="module", params=["isolated", "shared"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """A sandbox with the namespaces of this system, and one that was allowed to do without."""
    made = Sandbox(Limits(seconds=10.0))
    made.__dict__["is_isolated"] = request.param == "isolated"
    answer = made._outcome("", is_isolated=made.is_isolated)
    if answer != "passed":
        pytest.skip(f"no user namespaces here: {answer}")
    return made


def test_a_value_arrives_as_it_was(sandbox):
    imports = "import collections, datetime, decimal, fractions, numpy"
    same = (
        "def same(a, b):\n    if type(a) is type(b) is numpy.ndarray:\n"
        "        return a.dtype == b.dtype and a.shape == b.shape and (a == b).all()\n"
        "    return type(a) is type(b) and a == b and repr(a)[:4000] == repr(b)[:4000]"
    )
    tests = [f"{imports}\nimport sys\nsys.set_int_max_str_digits(0)\n{same}"]
    for value in VALUES:
        tests += [f"assert same(f({value}), {value}), 1", f"assert same(given({VALUES.index(value)}), {value}), 2"]
    program = f"{imports}\ndef f(x): return x\ndef given(n): return [{', '.join(VALUES)}][n]"
    assert sandbox.run(program, "\n".join(tests)) == "passed"


@pytest.mark.parametrize(("program", "tests"), HONEST.values(), ids=HONEST)
def test_an_honest_program_passes_as_if_its_tests_were_its_last_lines(sandbox, program, tests):
    assert sandbox.run(program, tests) == "passed"


@pytest.mark.parametrize(("program", "tests"), FAKES.values(), ids=FAKES)
def test_what_fakes_a_pass_in_one_process_fails_in_two(sandbox, program, tests):
    assert sandbox.run(f"{program}\n{tests}") == "passed"
    assert sandbox.run(program, tests).startswith("failed: ")


@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS)
def test_tests_that_expect_any_error_are_not_met_by_ending(sandbox, program):
    tests = "try:\n    f()\nexcept Exception:\n    pass\nelse:\n    assert False"
    assert sandbox.run(program, tests).startswith("failed: ")


def test_no_message_makes_the_tests_run_code(sandbox):
    for message in MESSAGES:
        program = (
            "import os\ndef g(h):\n    for fd in range(3, 32):\n        try:\n"
            f"            os.write(fd, {message!r}.encode() + b'\\n')\n        except OSError:\n            pass"
        )
        tests = "def h(): pass\nfound = g(h)\nassert found is type(found) or found.f() == 1"
        assert sandbox.run(program, tests).startswith("failed: "), message


def test_a_program_cannot_walk_from_what_it_is_given_into_the_tests(sandbox):
    program = "def f(one, name): return one._link.ask('getattr', one, name)"
    tests = (
        "class Node: pass\ndef g(): yield\nfor one in (g, g(), Node(), Node):\n"
        "    for name in ('__globals__', '__code__', '__class__', '__init__', '__dict__'):\n"
        "        try:\n            f(one, name)\n        except TypeError as error:\n"
        "            assert 'not possible' in str(error)\n        else:\n            assert False, name"
    )
    assert sandbox.run(program, tests) == "passed"
