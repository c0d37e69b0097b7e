"""Programs that models write: run apart, bounded in every direction, and passing only if their last line has run."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from l2d_framework.errors import ConfigError
from l2d_framework.evaluation.code import sandbox as module
from l2d_framework.evaluation.code.sandbox import ALLOW_NETWORK, Limits, Sandbox

NO_NAMESPACES = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


@pytest.fixture(scope="module")
def isolated() -> Sandbox:
    """A sandbox in new namespaces; skips where the system has none."""
    made = Sandbox(Limits(seconds=1.0))
    answer = made._outcome("", is_isolated=True)
    if answer != "passed":
        pytest.skip(f"no user namespaces here: {answer}")
    return made


@pytest.fixture(params=["isolated", "shared"])
def sandbox(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A sandbox with the namespaces of this system, and one that was allowed to do without."""
    if request.param == "isolated":
        return request.getfixturevalue("isolated")  # type: ignore[no-any-return]
    made = Sandbox(Limits(seconds=1.0))
    made.__dict__["is_isolated"] = False
    return made


def alive(mark: str) -> bool:
    """Whether a process with this word in its command line exists."""
    found = [Path(folder, "cmdline") for folder in Path("/proc").glob("[0-9]*")]
    words = (path.read_bytes() if path.exists() else b"" for path in found)
    return any(mark.encode() in line for line in words)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "program",
    [
        "x = 1\nassert x == 1",
        "import numpy as np\nassert np.allclose([1.0], [1.0])",
        "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int = 1\nassert Point().x == 1",
        "open('note.txt', 'w').write('x')\nassert open('note.txt').read() == 'x'",
        "import os\nassert os.path.samefile(os.environ['HOME'], os.getcwd()) and os.listdir() == []",
        "import subprocess\nassert subprocess.run(['echo', 'a'], capture_output=True).stdout == b'a\\n'",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(50,)).start()",
        "print('x' * 10_000_000)",
        "import inspect\ndef f(x: int): ...\nassert inspect.signature(f).parameters['x'].annotation is int",
    ],
)
def test_what_solutions_do_passes(sandbox, program):
    assert sandbox.run(program) == "passed"


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "def",
        "x = '\x00'",
        "import sys\nsys.exit(0)\nassert False",
        "import os\nos._exit(0)\nassert False",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes\nctypes.string_at(0)",
        "print('passed')\nassert False",
        "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'passed')\n    except OSError:\n        ...\n"
        "os._exit(0)",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
        "import os\nfor fd in range(3, 64):\n    try:\n        os.close(fd)\n    except OSError:\n        pass",
        "class Odd(Exception):\n    def __str__(self):\n        raise ValueError\nraise Odd",
        "def deeper(n):\n    return deeper(n + 1)\ndeeper(0)",
        "input()",
        "import torch",
        "def first(xs: List[int]) -> int:\n    return xs[0]",
    ],
)
def test_what_does_not_reach_its_last_line_fails(sandbox, program):
    assert sandbox.run(program).startswith("failed: ")


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(100)",
        "import signal, time\nfor number in range(1, 30):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except OSError:\n        pass\ntime.sleep(100)",
        "while True:\n    print('x' * 100_000, flush=True)",
        "import os\nos.set_blocking(1, True)\nfor fd in range(3, 64):\n    try:\n        while True:\n"
        "            os.write(fd, b'x' * 100_000)\n    except OSError:\n        pass",
    ],
)
def test_what_does_not_end_is_ended(sandbox, program):
    began = time.monotonic()
    assert sandbox.run(program) == "timed out"
    assert time.monotonic() - began < 10


def test_a_fork_bomb_stays_small_and_is_cleared_away(isolated, tmp_path):
    mark = f"bomb-{os.getpid()}"
    bomb = (
        f"import os\nopen('{mark}', 'w')\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    )
    assert isolated.run(bomb) == "timed out"
    many = "import os, time\nfor n in range(1000):\n    if os.fork() == 0:\n        time.sleep(60)"
    assert "BlockingIOError" in isolated.run(many)


def test_children_do_not_outlive_their_program(sandbox):
    mark = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    sleeper = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', '{mark}'"
    for rest in ("], start_new_session=True)", "], start_new_session=True)\nwhile True:\n    pass"):
        sandbox.run(sleeper + rest)
        assert not alive(mark)


def test_memory_and_disk_are_bounded(sandbox):
    assert sandbox.run("bytearray(1 << 31)").startswith("failed: MemoryError")
    assert sandbox.run("file = open('x', 'wb')\nwhile True:\n    file.write(bytes(1 << 20))").startswith(
        "failed: OSError"
    )
    assert "Too many open files" in sandbox.run("import os\nfor n in range(100):\n    os.dup(0)")


MIB = 1 << 20
SEVERAL = (
    "import os, time\nfor n in range(4):\n    if os.fork() == 0:\n        {}\n        time.sleep(60)\ntime.sleep({})"
)


def test_the_memory_of_all_processes_together_is_bounded():
    for is_isolated in (True, False):
        made = Sandbox(Limits(seconds=4.0, memory=400 * MIB))
        made.__dict__["is_isolated"] = is_isolated
        assert made.run(SEVERAL.format("x = b'x' * (150 << 20)", 60)).startswith("failed: MemoryError")
        assert made.run("x = b'x' * (150 << 20)\n" + SEVERAL.format("x[0]", 0.5)) == "passed"  # one copy for all
        assert made.run(SEVERAL.format("x = b'x' * (20 << 20)", 0.5)) == "passed"


def test_shared_memory_can_be_used_and_counts(isolated):
    assert isolated.run("open('/dev/shm/x', 'wb').write(bytes(10 << 20))") == "passed"
    files = "for n in range({}):\n    open(f'/dev/shm/{{n}}', 'wb').write(bytes(60 << 20))\n"
    made = Sandbox(Limits(seconds=3.0, memory=400 * MIB))
    assert "No space left" in made.run(files.format(4))
    assert made.run(files.format(3) + "x = b'x' * (250 << 20)\nimport time\ntime.sleep(60)").startswith(
        "failed: MemoryError"
    )
    assert not os.path.exists("/dev/shm/0")


@pytest.mark.parametrize(
    "program",
    [
        "import multiprocessing\nwith multiprocessing.Pool(3) as pool:\n    assert pool.map(abs, [-1, 2]) == [1, 2]",
        "from concurrent.futures import ProcessPoolExecutor\ndef f(x): return x + 1\n"
        "with ProcessPoolExecutor(2) as pool:\n    assert list(pool.map(f, [1, 2])) == [2, 3]",
        "import multiprocessing as m\nvalue, lock = m.Value('i', 0), m.Lock()\n"
        "def add():\n    with lock:\n        value.value += 1\n"
        "all = [m.Process(target=add) for _ in range(3)]\n[p.start() for p in all], [p.join() for p in all]\n"
        "assert value.value == 3",
        "from multiprocessing.shared_memory import SharedMemory\nblock = SharedMemory(create=True, size=9)\n"
        "other = SharedMemory(block.name)\nother.buf[0] = 7\nassert block.buf[0] == 7\nother.close()\nblock.close()\n"
        "block.unlink()",
    ],
    ids=["pool", "executor", "lock", "shared memory"],
)
def test_programs_may_use_several_processes(sandbox, program):
    made = Sandbox(Limits(seconds=10.0))
    made.__dict__["is_isolated"] = sandbox.is_isolated
    assert made.run(program) == "passed"


def test_many_files_are_bounded_together(isolated):
    many = "for n in range(100):\n    open(f'{n}', 'wb').write(bytes(10 << 20))"
    assert "No space left" in isolated.run(many)


def test_a_program_may_delete_its_own_folder_and_harms_nothing_else(sandbox):
    delete = "import os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)"
    assert sandbox.run(delete) == "passed"
    assert sandbox.run("x = 1") == "passed"


def test_there_is_no_network(isolated):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert isolated.run(program).startswith("failed: ")
        made = Sandbox(Limits(seconds=5.0))
        made.__dict__["is_isolated"] = False
        assert made.run(program) == "passed"


def test_files_are_hidden_or_read_only(isolated, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    tmp_path.chmod(0o777)
    assert isolated.run(f"open({str(note)!r}, 'a')").startswith("failed: ")
    assert isolated.run(f"import os\nassert os.listdir({os.path.expanduser('~')!r}) == []") == "passed"
    assert isolated.run("open('/var/tmp/l2d', 'w')").startswith("failed: OSError: [Errno 30]")
    assert isolated.run("import os\nassert sorted(os.listdir('/tmp')) == ['home', 'packages', 'python']") == "passed"
    assert note.read_text() == "mine"


def test_nothing_of_the_caller_is_seen(isolated, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    program = (
        "import os\nassert 'HF_TOKEN' not in os.environ and os.listdir('/proc') == []\n"
        "for other in range(3, 50_000):\n    try:\n        os.kill(other, 0)\n    except ProcessLookupError:\n"
        "        continue\n    assert False"
    )
    assert isolated.run(program) == "passed"


def test_rights_cannot_be_won_back(isolated):
    assert isolated.run("import os\nos.setuid(0)" if os.getuid() == 0 else "import os\nos.chroot('/')") != "passed"
    again = "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.umount2(b'/tmp', 2) == 0"
    assert isolated.run(again).startswith("failed: AssertionError")


def test_folders_are_cleared_away(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sandbox.run("import os\nos.mkdir('a')\nopen('a/b', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []


def test_only_what_dead_callers_left_is_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = (
        "import sys, threading, time\nfrom l2d_framework.evaluation.code.sandbox import Limits, Sandbox\n"
        "def run(): Sandbox(Limits(seconds=30.0))._outcome('import time; time.sleep(30)', is_isolated=False)\n"
        "threading.Thread(target=run, daemon=True).start()\nprint('started', flush=True)\nsys.stdin.read()"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    callers = [
        subprocess.Popen([sys.executable, "-c", program], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        wait_for(lambda: len(list(tmp_path.glob("*/home"))) == 2)
        (tmp_path / "l2d-program-file").write_text("no room")
        (tmp_path / "l2d-program-link").symlink_to(tmp_path)
        (tmp_path / "another").mkdir()
        callers[0].kill()
        callers[0].wait()

        def left():
            # The program of a caller that was killed may outlive it for a moment.
            module._clear.cache_clear()
            assert Sandbox(Limits(seconds=5.0))._outcome("", is_isolated=False) == "passed"
            return [path for path in tmp_path.iterdir() if not path.name.endswith(("file", "link", "another"))]

        wait_for(lambda: len(left()) == 1)
        assert (left()[0] / "home").is_dir()
        assert (tmp_path / "l2d-program-file").exists() and (tmp_path / "another").is_dir()
    finally:
        for caller in callers:
            caller.kill()
            caller.communicate()


def test_a_room_that_is_cleared_away_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    made, make = [], module.tempfile.mkdtemp

    def lose_the_first(**options):
        made.append(make(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(module.tempfile, "mkdtemp", lose_the_first)
    with module._own_room(str(tmp_path)) as room:
        assert room == made[1] and module._locked(room, waits=False) is None
    assert not list(tmp_path.iterdir())


def test_a_supervisor_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(module, "_source", lambda name: "import time; time.sleep(100)")
    monkeypatch.setattr(module, "_GRACE", 0.0)
    assert Sandbox(Limits(seconds=0.5))._outcome("", is_isolated=True) == "timed out"


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_without_namespaces_programs_are_refused_unless_allowed(isolated, tmp_path):
    program = (
        "from l2d_framework.evaluation.code.sandbox import Sandbox\n"
        "try:\n    print(Sandbox().run('x = 1'))\nexcept ValueError as error:\n    print(error)"
    )
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", NO_NAMESPACES, "sh", sys.executable, "-c", program]
    answers = []
    for environ in ({}, {ALLOW_NETWORK: "1"}):
        found = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **environ}, capture_output=True, text=True, check=True, timeout=60
        )
        answers.append(found.stdout)
    assert "--allow-network-in-sandbox" in answers[0] and ALLOW_NETWORK in answers[0]
    assert answers[1] == "passed\n" and "WITH your network" in found.stderr


def test_isolation_that_breaks_down_later_stops_the_evaluation(monkeypatch):
    made = Sandbox()
    made.__dict__["is_isolated"] = True
    monkeypatch.setattr(Sandbox, "_outcome", lambda *_, **__: "refused: unshare: No space left on device")
    with pytest.raises(ConfigError, match="No space left"):
        made.run("x = 1")
