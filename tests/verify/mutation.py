"""A plugin for pytest that takes the verifier's checks away, one at a time, and names those that no test misses.

    python -m pytest -q --tb=native -p tests.verify.mutation tests/verify

Every judging module is parsed when it is imported, and its syntax tree rewritten so that each check asks `Probe` whether
it counts. All tests run once with every check in force, which tells what each of them reaches. Then, for each check, the
tests that it made a difference to run again without it, until one of them is red. Where none is, the check is named.

What is taken away (`Rewriter`):

(1) a verdict: `failed(…)`, and a `compare(…)` that does not hold, become a pass
(2) a fault: what is yielded, appended, added to a list, raised, or done for its exception alone, is not; a list of
    faults is empty; a word that says what is wrong is ""
(3) a part of a condition: one operand of `and` or `or`, one link of `a <= b <= c`
(4) an answer: `return True` and `return False` of a function that is a question are exchanged
(5) a member of what is written out to be gone through, or of what `min` and `max` choose from

Not taken away: what is displayed, and factors that say what is not checked. Tests that flip every bit, generated ones
and those over third-party evidence do not run: they are slow, or absent elsewhere, and each check needs a case of its own.
"""

import ast
import importlib.machinery
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

__all__ = ["JUDGES", "PROBE", "Probe", "Site", "pytest_addoption", "pytest_load_initial_conftests", "rewritten"]

JUDGES = (
    "amd_certificates",
    "appraisers",
    "azure",
    "boot_log",
    "certificates",
    "document",
    "enrol",
    "intel",
    "intel_chain",
    "intel_library",
    "intel_report",
    "intel_tcb",
    "key_configs",
    "measurement",
    "nitro",
    "nvidia",
    "p384",
    "provenance",
    "rim",
    "sev_snp",
    "simulated",
    "tls",
    "tpm_certificates",
    "vtpm",
)
"""Modules of `cloister.verify`; the others hold values, and the policy's parser."""

_ROOM = "cloister.verify."
PROBE = "__probe__"
"""The name by which the rewritten modules know theirs."""
_SWEEPS = ("flip", "_bit_of", "each_bit", "single_bit", "truncation")
"""Words of the names of tests that go over every byte."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a check is: `where` the functions around it, `text` its source."""

    module: str
    line: int
    where: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {self.kind} in {self.where}: {self.text}"


class Probe:
    """What the rewritten modules ask. `off`: the site that does not count now. `reached`: where it would matter."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.off: int | None = None
        self.reached: set[int] = set()
        self.asked = 0

    def _is_off(self, site: int) -> bool:
        self.asked += 1
        self.reached.add(site)
        return site == self.off

    def verdict(self, site: int, factor: Any) -> Any:
        """A factor that failed, or the same one passed."""
        if factor.verdict != "fail" or not self._is_off(site):
            return factor
        return type(factor)(factor.step, "pass", factor.got, factor.got)

    def counts(self, site: int) -> bool:
        return not self._is_off(site)

    def part(self, site: int, value: Any, neutral: bool) -> Any:
        if bool(value) == neutral or not self._is_off(site):
            return value
        return neutral

    def value(self, site: int, value: Any, other: Any) -> Any:
        return other if self._is_off(site) else value

    def member(self, site: int, value: Any) -> tuple[Any, ...]:
        return () if self._is_off(site) else (value,)


class Rewriter(ast.NodeTransformer):
    """Writes a question to the probe wherever a check is. Each site gets the next number of `probe.sites`."""

    def __init__(self, module: str, probe: Probe) -> None:
        self._module = module
        self._probe = probe
        self._functions: list[ast.FunctionDef] = []

    def _ask(self, question: str, node: ast.AST, kind: str, *arguments: ast.expr) -> ast.Call:
        where = ".".join(function.name for function in self._functions)
        text = " ".join(ast.unparse(node).split())
        self._probe.sites.append(Site(self._module, getattr(node, "lineno", 0), where, kind, text[:160]))
        number = ast.Constant(len(self._probe.sites) - 1)
        return ast.Call(ast.Attribute(ast.Name(PROBE, ast.Load()), question, ast.Load()), [number, *arguments], [])

    def _guarded(self, node: ast.stmt, kind: str) -> ast.stmt:
        question = self._ask("counts", node, kind)
        return ast.If(question, [self.generic_visit(node)], [])  # type: ignore[list-item]

    def _returns(self, *names: str) -> bool:
        returned = self._functions[-1].returns
        name = returned.value if isinstance(returned, ast.Subscript) else returned
        return isinstance(name, ast.Name) and name.id in names

    # Only inside functions: what a module does when it is imported judges nothing.

    def visit_Module(self, node: ast.Module) -> ast.AST:
        return self._definitions(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._definitions(node)

    def _definitions(self, node: ast.Module | ast.ClassDef) -> ast.AST:
        inner = ast.FunctionDef | ast.ClassDef
        node.body = [self.visit(each) if isinstance(each, inner) else each for each in node.body]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """What a function answered with a check removed must not be remembered when it is back."""
        node.decorator_list = [each for each in node.decorator_list if not _names(each, "lru_cache")]
        self._functions.append(node)
        node.body = [self.visit(statement) for statement in node.body]
        self._functions.pop()
        return node

    # (1) verdicts, (5) the members of min and max

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if _names(node, "failed", "compare"):
            return self._ask("verdict", node, "verdict", self.generic_visit(node))  # type: ignore[arg-type]
        if _names(node, "min", "max") and len(node.args) > 1:
            members = self._members(node.args)
            return ast.Call(node.func, [ast.Tuple(members, ast.Load())], node.keywords)
        return self.generic_visit(node)

    # (2) faults

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        value = node.value
        if isinstance(value, ast.Constant):
            return node
        said = value.value if isinstance(value, ast.Yield) else None
        if said is not None and _names(said, "failed", "compare", "passed", "not_checked"):
            return self.generic_visit(node)
        return self._guarded(node, "fault")

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        counted = isinstance(node.value, ast.BinOp | ast.Constant)
        return self.generic_visit(node) if counted else self._guarded(node, "fault")

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._guarded(node, "fault")

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.value, ast.ListComp):
            question = self._ask("counts", node, "fault")
            listed = ast.IfExp(question, self.generic_visit(node.value), ast.List([], ast.Load()))  # type: ignore[arg-type]
            return ast.Assign(node.targets, listed, lineno=node.lineno)
        return self.generic_visit(node)

    # (2) words, (4) answers

    def visit_Return(self, node: ast.Return) -> ast.AST:
        value = node.value
        if isinstance(value, ast.Constant) and isinstance(value.value, bool) and self._returns("bool", "TypeGuard"):
            return ast.Return(self._ask("value", node, "answer", value, ast.Constant(not value.value)))
        if value is not None and self._returns("str"):
            return ast.Return(self._word(value))
        if isinstance(value, ast.BoolOp) and self._returns("bool", "TypeGuard"):
            return ast.Return(self._condition(value))
        return self.generic_visit(node)

    def _word(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Constant) and node.value:
            return self._ask("value", node, "fault", node, ast.Constant(""))
        if isinstance(node, ast.IfExp):
            return ast.IfExp(self._condition(node.test), self._word(node.body), self._word(node.orelse))
        return self.visit(node)  # type: ignore[no-any-return]

    # (3) conditions

    def _condition(self, node: ast.expr) -> ast.expr:
        """Where only truth counts; elsewhere `a or b` chooses a value."""
        if isinstance(node, ast.BoolOp):
            neutral = ast.Constant(isinstance(node.op, ast.And))
            values = [self._ask("part", each, "condition", self._condition(each), neutral) for each in node.values]
            return ast.BoolOp(node.op, values)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ast.UnaryOp(node.op, self._condition(node.operand))
        return self.visit(node)  # type: ignore[no-any-return]

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        return self._condition(node) if isinstance(node.op, ast.And) else self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        return self._condition(node) if isinstance(node.op, ast.Not) else self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) == 1:
            return self.generic_visit(node)
        left = [node.left, *node.comparators[:-1]]
        links = [ast.Compare(a, [op], [b]) for a, op, b in zip(left, node.ops, node.comparators, strict=True)]
        return self._condition(ast.copy_location(ast.BoolOp(ast.And(), [_at(node, link) for link in links]), node))

    def visit_If(self, node: ast.If) -> ast.AST:
        node.test = self._condition(node.test)
        node.body = [self.visit(statement) for statement in node.body]
        node.orelse = [self.visit(statement) for statement in node.orelse]
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        return ast.IfExp(self._condition(node.test), self.visit(node.body), self.visit(node.orelse))

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        node.ifs = [self._condition(each) for each in node.ifs]
        node.iter = self._gone_through(node.iter)
        return node

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.AST:
        node.elt = self._condition(node.elt)
        node.generators = [self.visit(each) for each in node.generators]
        return node

    # (5) members

    def visit_For(self, node: ast.For) -> ast.AST:
        node.iter = self._gone_through(node.iter)
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def _gone_through(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Tuple | ast.List):
            return type(node)(self._members(node.elts), ast.Load())
        return self.visit(node)  # type: ignore[no-any-return]

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        return self._table(node)

    def visit_List(self, node: ast.List) -> ast.AST:
        return self._table(node)

    def _table(self, node: ast.Tuple | ast.List) -> ast.AST:
        rows = len(node.elts) > 1 and all(isinstance(each, ast.Tuple) for each in node.elts)
        if rows and isinstance(node.ctx, ast.Load):
            return type(node)(self._members(node.elts), ast.Load())
        return self.generic_visit(node)

    def _members(self, nodes: Sequence[ast.expr]) -> list[ast.expr]:
        return [
            node
            if isinstance(node, ast.Starred)
            else ast.Starred(self._ask("member", node, "member", self.visit(node)), ast.Load())
            for node in nodes
        ]


def _names(node: ast.AST, *names: str) -> bool:
    """A call of one of them."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _at(where: ast.AST, node: ast.expr) -> ast.expr:
    return ast.copy_location(node, where)


def rewritten(source: str, module: str, probe: Probe) -> ast.Module:
    """The module with every check in question. `probe` learns of its sites."""
    tree = Rewriter(module, probe).visit(ast.parse(source))
    return ast.fix_missing_locations(tree)  # type: ignore[no-any-return]


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, probe: Probe) -> None:
        super().__init__(fullname, path)
        self._probe = probe

    def get_code(self, fullname: str) -> CodeType:
        tree = rewritten(Path(self.path).read_text(), fullname.removeprefix(_ROOM), self._probe)
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, PROBE, self._probe)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Before all others, so that nobody has the modules as they are written."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix(_ROOM) not in JUDGES or not fullname.startswith(_ROOM):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin, self._probe)
        return spec


class _Plugin:
    """Takes over from pytest once the tests are collected."""

    def __init__(self, probe: Probe, report: Path | None) -> None:
        self._probe = probe
        self._report = report
        self._red = False
        self._missed: dict[str, int] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not _is_left_out(item)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items, broken = session.items, []
        reaching: dict[int, list[tuple[int, pytest.Item]]] = defaultdict(list)
        for item in items:
            self._probe.asked, self._probe.reached = 0, set()
            if self._is_red(item):
                broken.append(item.nodeid)
                continue
            for site in self._probe.reached:
                reaching[site].append((self._probe.asked, item))
        survivors = [site for site in range(len(self._probe.sites)) if not self._is_missed(site, reaching[site])]
        self._tell(broken, survivors, {site for site in survivors if reaching[site]})
        return True

    def _is_missed(self, site: int, reaching: list[tuple[int, pytest.Item]]) -> bool:
        """Those go first that missed a check most lately, then those that ask little, which are quick."""
        self._probe.off = site
        found = None
        for _, item in sorted(reaching, key=lambda one: (-self._missed.get(one[1].nodeid, -1), one[0])):
            if self._is_red(item):
                self._missed[item.nodeid] = site
                found = item
                break
        self._probe.off = None
        return found is not None

    def _is_red(self, item: pytest.Item) -> bool:
        self._red = False
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return self._red

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._red = self._red or report.failed

    def _tell(self, broken: list[str], survivors: list[int], reached: set[int]) -> None:
        sites = self._probe.sites
        for nodeid in broken:
            sys.stdout.write(f"red with every check in force: {nodeid}\n")
        for at in survivors:
            sys.stdout.write(f"{sites[at]}{'' if at in reached else ' (never reached)'}\n")
        if self._report is not None:
            counts = Counter(site.module for site in sites)
            left = [asdict(sites[at]) for at in survivors]
            self._report.write_text(json.dumps({"sites": counts, "broken": broken, "survivors": left}))


def _is_left_out(item: pytest.Item) -> bool:
    name = getattr(item, "originalname", item.name)
    generated = hasattr(getattr(item, "obj", None), "hypothesis")
    return generated or item.get_closest_marker("skipif") is not None or any(word in name for word in _SWEEPS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--survivors", metavar="FILE", type=Path, help="where to write, as JSON, which checks nobody misses"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before anything imports the verifier."""
    probe = Probe()
    sys.meta_path.insert(0, _Finder(probe))
    early_config.pluginmanager.register(_Plugin(probe, early_config.known_args_namespace.survivors))
