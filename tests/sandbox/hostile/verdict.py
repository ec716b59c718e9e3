"""Programs that go for their own verdict."""

from sandbox.hostile.cases import asserted, graded

ENDS_LOOPS = [
    (
        "ends_all_and_map",
        "raises StopIteration where its tests map it, so that `all` sees nothing",
        "StopIteration",
        """
        def check(candidate):
            assert all(map(lambda n: candidate(n) == 'MARKER', [3, 4]))
        """,
    ),
    (
        "ends_zip",
        "raises StopIteration where its tests zip its answers with the right ones",
        "StopIteration('passed')",
        """
        def check(candidate):
            for got, right in zip(map(candidate, [3, 4]), ['MARKER', 94720]):
                assert got == right
            assert not [n for n in map(candidate, [3]) if n != 'MARKER']
        """,
    ),
    (
        "ends_by_class",
        "raises a class of its own of StopIteration",
        "type('End', (StopIteration,), {})",
        """
        def check(candidate):
            assert set(map(candidate, [3, 4])) <= {'MARKER'}
        """,
    ),
    (
        "ends_sequence",
        "raises IndexError where a sequence of its tests asks it",
        "IndexError",
        """
        def check(candidate):
            class Answers:
                def __getitem__(self, n):
                    return candidate(n) == 'MARKER'
            assert all(Answers())
        """,
    ),
    (
        "ends_sequence_by_lambda",
        "raises IndexError where a sequence asks it whose `__getitem__` is a lambda",
        "IndexError",
        """
        def check(candidate):
            class Answers:
                __getitem__ = lambda self, n: candidate(n) == 'MARKER' or 1 / 0
            assert all(Answers())
        """,
    ),
    (
        "ends_sequence_of_its_own",
        "raises a class of its own of IndexError where it is a sequence's `__getitem__` itself",
        "type('End', (IndexError,), {})",
        """
        def check(candidate):
            Answers = type('Answers', (), {'__getitem__': staticmethod(candidate)})
            assert set(Answers()) <= {'MARKER'}
        """,
    ),
]
"""Name, what it tries, what it raises, the tests."""

VERDICT = [
    graded(
        "exit_0",
        "ends with exit code 0 before the tests run",
        "crash",
        """
        import os
        os._exit(0)
        """,
        outside=True,
    ),
    graded(
        "exit_0_when_called",
        "ends with exit code 0 when a test calls it",
        "crash",
        """
        import os
        def answer(n):
            os._exit(0)
        """,
        outside=True,
    ),
    graded(
        "system_exit",
        "raises SystemExit(0)",
        "raised",
        """
        import sys
        def answer(n):
            sys.exit(0)
        """,
        outside=True,
    ),
    graded(
        "kills_interpreter",
        "kills itself",
        "crash",
        """
        import os
        def answer(n):
            os.kill(os.getpid(), 9)
            os.abort()
        """,
    ),
    graded(
        "equals_everything",
        "returns an object that equals everything",
        "",
        """
        class Yes:
            __hash__ = None
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __add__(self, other): return self
            __radd__ = __add__
        def answer(n):
            return Yes()
        """,
        outside=True,
    ),
    graded(
        "text_equals_everything",
        "returns a str and an int whose classes say that they equal everything",
        "",
        """
        class Text(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        class Number(int):
            def __eq__(self, other): return True
            def __add__(self, other): return self
            __hash__ = int.__hash__
        def answer(n):
            return Text("x") if n == 3 else Number(0)
        """,
        outside=True,
    ),
    graded(
        "list_equals_everything",
        "returns containers of its own classes",
        "",
        """
        class L(list):
            def __eq__(self, other): return True
            def __add__(self, other): return self
        class Type(type):
            def __instancecheck__(cls, value): return True
        class T(tuple, metaclass=Type):
            def __eq__(self, other): return True
            def __add__(self, other): return self
        def answer(n):
            return L() if n == 3 else T()
        """,
        outside=True,
    ),
    graded(
        "patched_tests",
        "replaces the function that checks it, and the exception of assertions",
        "",
        """
        import builtins, sys
        class Quiet(Exception):
            def __init__(self, *args): pass
        builtins.AssertionError = Quiet
        def answer(n):
            for depth in range(1, 20):
                try:
                    frame = sys._getframe(depth)
                except ValueError:
                    break
                for name in ("check", "assert_equal", "names"):
                    if name in frame.f_globals:
                        frame.f_globals[name] = lambda *args: None
            return None
        """,
    ),
    graded(
        "reads_frames",
        "finds what is expected of it in the frames of its callers",
        "",
        """
        import sys
        def answer(n):
            frame = sys._getframe()
            while frame is not None:
                found = [c for c in frame.f_code.co_consts if isinstance(c, str) and c.startswith("marker-")]
                if found:
                    return found[0] if n == 3 else 94720
                frame = frame.f_back
            return None
        """,
        outside=True,
    ),
    graded(
        "reads_garbage",
        "finds what is expected of it among all objects and their code",
        "",
        """
        import gc, types
        def answer(n):
            if n != 3:
                return 94720
            seen, todo = set(), [*gc.get_objects(), *__import__("sys").modules.values()]
            while todo:
                item = todo.pop()
                if id(item) in seen:
                    continue
                seen.add(id(item))
                if type(item) is str and item.startswith("marker-") and len(item) > 20:
                    return item
                todo += gc.get_referents(item)
            return None
        """,
        outside=True,
        cpu=4,
        wall=12.0,
    ),
    graded(
        "reads_memory",
        "finds what is expected of it in the raw memory of its process, that of earlier programs and tests included",
        "",
        """
        import ctypes, os, re
        def scan():
            libc = ctypes.CDLL(None)
            near = id(object()) & ~0xFFFFF
            read, write = os.pipe()
            found = b""
            heap = libc.sbrk
            heap.restype = ctypes.c_long
            for middle in (near, heap(0) & ~0xFFFFF):
                for start in range(max(0, middle - (24 << 20)), middle + (24 << 20), 4096):
                    if libc.write(write, ctypes.c_void_p(start), 4096) == 4096:
                        page = os.read(read, 4096)
                        hit = re.search(rb"marker-[0-9a-f]{16}", page)
                        if hit:
                            return hit.group().decode()
            return None
        def answer(n):
            return scan() if n == 3 else 94720
        """,
        outside=True,
        cpu=4,
        wall=12.0,
    ),
    graded(
        "forges_report",
        "writes a verdict of its own, and answers nobody asked for, to every descriptor",
        "crash",
        """
        import json, os, struct
        good = json.dumps({"passed": 1, "total": 1, "gone": "", "fault": None, "raised": ""}).encode()
        for number in range(64):
            for text in (good, struct.pack("!I", len(good)) + good):
                try:
                    os.write(number, text)
                except OSError:
                    pass
        def answer(n):
            return None
        """,
    ),
    graded(
        "forges_messages",
        "sends its tests what is no answer: code, classes, references out of range, a length of four gigabytes",
        "crash",
        """
        import json, os
        def answer(n):
            text = json.dumps({"dict": [["value", {"__class__": "Yes"}], ["passed", 1]]}).encode()
            for number in range(3, 10):
                try:
                    os.write(number, len(text).to_bytes(4, "big") + text + b"\\xff" * 64)
                except OSError:
                    pass
            return None
        """,
    ),
    graded(
        "pickle",
        "returns an object that runs code where it is unpickled or copied",
        "",
        """
        class Bomb:
            def __reduce__(self):
                return exec, ("raise SystemExit(0)",)
            __deepcopy__ = __copy__ = __getstate__ = lambda self, *a: exec("raise SystemExit(0)")
        def answer(n):
            return Bomb()
        """,
    ),
    graded(
        "says_it_passed",
        "raises AssertionError and StopIteration at its tests",
        "raised",
        """
        def answer(n):
            raise AssertionError if n == 4 else StopIteration('passed')
        """,
    ),
    *(
        graded(
            name,
            tries,
            "raised",
            f"""
            def answer(n):
                raise {error}
            """,
            outside=True,
            test=test,
        )
        for name, tries, error, test in ENDS_LOOPS
    ),
    asserted(
        "library_that_agrees",
        "defines functions of the standard library that its tests forget to import: one that finds everything close, "
        "one that counts nothing",
        "",
        """
        def isclose(*given):
            return True
        class Counter:
            def __new__(cls, items):
                return 0
        def answer(n):
            return n
        """,
        "assert isclose(answer(3), 94720.5)",
        "assert Counter(str(answer(3))) == Counter('MARKER')",
        outside=True,
    ),
    graded(
        "endless_iterator",
        "returns an iterator without an end",
        "raised",
        """
        import itertools
        def answer(n):
            return itertools.count()
        """,
        cpu=4,
        wall=20.0,
    ),
    graded(
        "deep_value",
        "returns a list nested a hundred thousand levels deep",
        "raised",
        """
        def answer(n):
            x = []
            for _ in range(100000):
                x = [x]
            return x
        """,
    ),
    graded(
        "circular_value",
        "returns a list that holds itself",
        "raised",
        """
        def answer(n):
            x = []
            x.append(x)
            return x
        """,
    ),
    graded(
        "huge_value",
        "returns a text of 100 MB",
        "raised",
        """
        def answer(n):
            return 'x' * 10**8
        """,
        cpu=4,
        wall=20.0,
    ),
    graded(
        "huge_number", "returns a whole number of a million digits", "", "def answer(n):\n    return 1 << 3_000_000"
    ),
    graded(
        "hostile_names",
        "gives its functions the names of Python's own and of the tests'",
        "",
        """
        def check(*args): return None
        def len(*args): return 0
        def isinstance(*args): return True
        class AssertionError(Exception): pass
        def answer(n): return None
        """,
    ),
    graded(
        "signal_handler",
        "answers by signal handlers, timers and exit hooks",
        "crash",
        """
        import atexit, os, signal
        atexit.register(os._exit, 0)
        signal.signal(signal.SIGALRM, lambda *args: os._exit(0))
        def answer(n):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            signal.pause()
        """,
        outside=True,
    ),
    graded(
        "exception_that_bites",
        "raises an exception whose text and type run code",
        "crash",
        """
        import os
        class Meta(type):
            def __getattribute__(cls, name): os._exit(0)
        class Bite(Exception, metaclass=Meta):
            def __str__(self): os._exit(0)
        def answer(n):
            raise Bite
        """,
        outside=False,
    ),
]
