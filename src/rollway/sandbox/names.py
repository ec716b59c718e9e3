"""What the names in tests stand for: what they define, the standard library, or the program.

A name that the program defines says what the program likes. One that decides a test (`isclose`, `Counter`) is therefore
looked for in the standard library first, and tests in which two names of the program might decide are refused.
"""

import ast
import builtins
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

_STANDARD = {
    "bisect": "bisect bisect_left bisect_right insort",
    "cmath": "phase polar rect",
    "collections": "Counter OrderedDict defaultdict deque namedtuple ChainMap",
    "copy": "copy deepcopy",
    "datetime": "date datetime timedelta",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "functools": "cmp_to_key partial reduce",
    "heapq": "heapify heappop heappush heappushpop nlargest nsmallest",
    "itertools": "accumulate chain combinations combinations_with_replacement compress count cycle dropwhile "
    "filterfalse groupby islice pairwise permutations product repeat starmap takewhile zip_longest",
    "json": "dumps loads",
    "math": "acos asin atan atan2 ceil comb copysign cos dist e exp fabs factorial floor fmod fsum gcd hypot inf "
    "isclose isfinite isinf isnan isqrt lcm log log10 log2 nan perm pi prod radians sin sqrt tan tau trunc",
    "operator": "add attrgetter eq itemgetter mul",
    "re": "findall finditer fullmatch match search split sub",
    "statistics": "mean median mode pstdev pvariance stdev variance",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits punctuation",
}
_HOME = {name: module for module, names in reversed(_STANDARD.items()) for name in names.split()}


class Ambiguous(Exception):
    """Tests that do not say which of their names is the function under test."""


class Names:
    """The names of a set-up and of tests. Raises SyntaxError, ValueError, RecursionError where they are no Python."""

    def __init__(self, setup: str, tests: list[str]) -> None:
        self._tests = [ast.parse(text) for text in tests]
        self._nodes = [node for tree in [ast.parse(setup), *self._tests] for node in ast.walk(tree)]
        self._theirs = set(_stored(self._nodes))
        self._defined = self._theirs | set(vars(builtins))

    def modules(self) -> dict[str, ModuleType]:
        """Modules of the standard library whose attributes are read without an import: a program often had it."""
        attributes = [node.value for node in self._nodes if isinstance(node, ast.Attribute)]
        read = {node.id for node in attributes if isinstance(node, ast.Name)} - self._defined
        found = sorted(read & sys.stdlib_module_names & set(sys.modules))
        return {name: sys.modules[name] for name in found}

    def standard(self, entries: list[str]) -> dict[str, Any]:
        """What of the standard library is used without an import, beside `entries`, the names of the program."""
        read = {node.id for node in self._nodes if isinstance(node, ast.Name)}
        found = sorted((read - self._defined - set(entries)) & set(_HOME))
        return {name: getattr(import_module(_HOME[name]), name) for name in found}

    def indexed(self) -> bool:
        """Whether the tests have a `__getitem__`, whose IndexError ends a loop over its object; however it is made."""
        return any(value == "__getitem__" for node in self._nodes for _, value in ast.iter_fields(node))

    def entries(self) -> list[str]:
        """The names that are called and that neither the tests, their set-up nor Python define: the program's.

        What the standard library has too is the library's, unless nothing else is called: a program may be asked for a
        `gcd`, or for a `sum` of its own. In that last case what the left side of the first assertion calls is meant.
        Raises Ambiguous where the program might decide a test otherwise than by the answer of one function.
        """
        called = {name for node in self._nodes if (name := _callee(node))}
        unknown = called - self._defined
        asserts = [node.test for tree in self._tests for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        if not unknown:
            return [self._of_pythons_own(asserts)]
        own = unknown - set(_HOME)
        functions = any(not name[:1].isupper() for name in own)  # else `search(Node(1))` may be the program's
        if len(unknown) > 1 and not (own and (functions or own == unknown) and self._clear(own, asserts)):
            raise _ambiguous(unknown, "which nothing defines")
        return sorted(own or unknown)

    def _of_pythons_own(self, asserts: list[ast.expr]) -> str:
        """The function that a program was asked for though Python has it. `abs(pow(2, 3) - 8)` does not say which."""
        judged = [node.left if isinstance(node, ast.Compare) else node for node in asserts[:1]]
        found = {name for node in judged for name in _calls(node, set(vars(builtins)) - self._theirs)}
        if not found:
            raise Ambiguous(
                "the first assertion calls nothing that a program may define: say in meta.entry_point what it defines"
            )
        if len(found) > 1:
            raise _ambiguous(found, "each of them Python's own")
        return found.pop()

    def _clear(self, found: set[str], asserts: list[ast.expr]) -> bool:
        """Whether of the program's names one may build another's arguments, but none judges another's answers.

        So they are called in assertions alone, of which each has one of them, or compares the answer of one outermost
        call with what is no word of the program's.
        """
        if len(found) < 2:
            return True
        everywhere = [node for tree in self._tests for node in ast.walk(tree)]
        asserted = [name for test in asserts for name in _calls(test, found)]
        clear = len(asserted) == len([node for node in everywhere if _callee(node) in found])
        for test in asserts:
            if len(set(_calls(test, found))) < 2:
                continue
            if not isinstance(test, ast.Compare):
                return False
            right = [name for other in test.comparators for name in _calls(other, found)]
            clear = clear and not right and len(set(_outermost(test.left, found))) == 1
        return clear


def _ambiguous(names: set[str], what: str) -> Ambiguous:
    listed = " and ".join([", ".join(sorted(names)[:-1]), sorted(names)[-1]])
    return Ambiguous(
        f"the tests call {listed}, {what}, and one of them may judge what another answers: say in meta.entry_point "
        "which the program defines (a name, or a list of names), or define or import the others in the set-up"
    )


def _stored(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        match node:
            case ast.Name(ctx=ast.Store() | ast.Del()):
                yield node.id
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import():
                yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
            case ast.ImportFrom(names=[ast.alias(name="*")], module=str(module)):
                yield from _all_of(module)
            case ast.ImportFrom():
                yield from (alias.asname or alias.name for alias in node.names)
            case ast.arg():
                yield node.arg


def _all_of(module: str) -> list[str]:
    """What `from module import *` brings; the set-up's own import says what is wrong with one that there is not."""
    try:
        return list(vars(import_module(module)))
    except Exception:
        return []


def _callee(node: ast.AST) -> str | None:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _calls(node: ast.AST, found: set[str]) -> list[str]:
    return [name for inner in ast.walk(node) if (name := _callee(inner)) in found and name is not None]


def _outermost(node: ast.AST, found: set[str]) -> list[str]:
    name = _callee(node)
    if name in found and name is not None:
        return [name]
    return [name for inner in ast.iter_child_nodes(node) for name in _outermost(inner, found)]
