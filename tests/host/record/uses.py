"""Finds what a Python file uses of ComfyUI, by its syntax, and holds it against surface.json.

It follows imports, plain aliases (`mm = comfy.model_management`, `self.queue = PromptServer.instance.prompt_queue`),
annotations, loops over lists whose elements the table knows, `getattr` and its like with a literal name, and calls that name
a ComfyUI module in a string. What it cannot resolve it lets pass: it is a net for mistakes, not a proof.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from .introspect import ABSENT
from .surface import Surface, is_comfyui

_SAFE_AS_STRING = ("comfy.", "comfy_execution.", "folder_paths.", "comfyui_version.")
_FORGIVING = {"ImportError", "ModuleNotFoundError", "AttributeError", "Exception", "BaseException"}
# A variable of this name is taken to be one, whatever its annotation: patchers travel as Any.
_BY_NAME = {"patcher": "comfy.model_patcher.ModelPatcher", "dynamic": "comfy.model_patcher.ModelPatcherDynamic"}
_OF_ENUMS = {"name", "value", "args"}  # of enums and exceptions: Python's, not ComfyUI's
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class Use(NamedTuple):
    line: int
    name: str
    asked: bool  # the code copes with its absence here: getattr, hasattr, or inside a forgiving try


class _Thing(NamedTuple):
    path: str


class _Instance(NamedTuple):
    cls: str


class _Elements(NamedTuple):
    cls: str


_Value = _Thing | _Instance | _Elements | None


def problems(source: str, shown_path: str, surface: Surface) -> list[str]:
    """One line per use of something unrecorded, or absent from a recorded version and used as if it were there."""
    found = find_uses(source, surface)
    asked_for = {use.name for use in found if use.asked}
    told: dict[tuple[int, str], str] = {}
    for use in found:
        kinds = surface.kinds(use.name)
        absent = sorted(version for version, kind in kinds.items() if kind == ABSENT)
        parent = surface.kinds(use.name.rpartition(".")[0])
        if not kinds:
            why = "is not recorded in surface.json"
        elif len(absent) == len(kinds):
            why = "is in no recorded ComfyUI"
        elif use.name not in asked_for and any(parent.get(version) != ABSENT for version in absent):
            why = f"is absent from {', '.join(absent)} and used as if it were always there"
        else:
            continue
        told.setdefault((use.line, use.name), f"{shown_path}:{use.line}: {use.name} {why}")
    return [told[key] for key in sorted(told)]


def find_uses(source: str, surface: Surface) -> list[Use]:
    tree = ast.parse(source)
    finder = _Finder(surface)
    finder.visit(tree)  # learns what later lines define: fields of self, results of functions
    finder.uses.clear()
    finder.visit(tree)
    return finder.uses


class _Finder(ast.NodeVisitor):
    def __init__(self, surface: Surface) -> None:
        self.surface = surface
        self.uses: list[Use] = []
        self.scopes: list[dict[str, _Value]] = [{}]
        self.fields: dict[str, _Value] = {}  # "Class.field" of classes in this file
        self.results: dict[str, _Value] = {}  # functions of this file -> what they return
        self.classes: list[str] = []
        self.functions: list[str] = []
        self.forgiving = 0

    # --- what an expression stands for ---

    def value(self, node: ast.expr | None) -> _Value:
        match node:
            case ast.Name(id=name):
                known = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
                return _Instance(_BY_NAME[name]) if known is None and name in _BY_NAME else known
            case ast.Attribute(value=ast.Name(id="self"), attr=attr) if self.classes:
                return self.fields.get(f"{self.classes[-1]}.{attr}")
            case ast.Attribute(value=owner, attr=attr):
                return self.member(self.value(owner), attr)
            case ast.Call():
                return self.call(node)
            case ast.Subscript(value=owner, slice=index):
                return self.item(self.value(owner), owner, index)
            case ast.NamedExpr(value=inner) | ast.Await(value=inner) | ast.Starred(value=inner):
                return self.value(inner)
            case ast.IfExp(body=first, orelse=second):
                return self.value(first) or self.value(second)
            case ast.BoolOp(values=values):
                return next((known for known in map(self.value, values) if known), None)
        return None

    def member(self, owner: _Value, attr: str) -> _Value:
        match owner:
            case _Thing(path):
                if not self.surface.has_children_of_its_own(path) and self.surface.kinds(path):
                    return None
                name = f"{path}.{attr}"
            case _Instance(cls):
                name = f"{cls}.{attr}"
            case _:
                return None
        if self.surface.is_called(name):
            return _Thing(name)
        if name in self.surface.instance_of:
            return _Instance(self.surface.instance_of[name])
        if name in self.surface.elements_of:
            return _Elements(self.surface.elements_of[name])
        return _Thing(name)

    def call(self, node: ast.Call) -> _Value:
        called = self.value(node.func)
        name = _literal(node.args[1]) if len(node.args) > 1 else None
        if isinstance(node.func, ast.Name) and node.func.id in self.results:
            return self.results[node.func.id]
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and name:
            return self.member(self.value(node.args[0]), name)
        if isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple", "reversed", "sorted") and node.args:
            return self.value(node.args[0])
        if isinstance(called, _Thing):
            if called.path in self.surface.instance_of:
                return _Instance(self.surface.instance_of[called.path])
            if called.path in self.surface.elements_of:
                return _Elements(self.surface.elements_of[called.path])
            if any(kind.startswith("class") for kind in self.surface.kinds(called.path).values()):
                return _Instance(called.path)
            return None
        module = _literal(node.args[0]) if node.args else None
        if module and is_comfyui(module) and called is None and "module" in self.surface.kinds(module).values():
            # import_module("..."), sys.modules.get("..."), or a helper of this pack that does the same.
            return self.member(_Thing(module), name) if name else _Thing(module)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
            return self.item(self.value(node.func.value), node.func.value, node.args[0])
        return None

    def item(self, owner: _Value, node: ast.expr, index: ast.expr) -> _Value:
        key = _literal(index)
        if isinstance(owner, _Elements):
            return owner if isinstance(index, ast.Slice) else _Instance(owner.cls)
        if owner == _Thing("nodes.NODE_CLASS_MAPPINGS") and key and self.surface.kinds(f"nodes.{key}"):
            return _Thing(f"nodes.{key}")
        if ast.unparse(node) == "sys.modules" and key and is_comfyui(key):
            return _Thing(key)
        return None

    def annotated(self, annotation: ast.expr | None) -> _Value:
        """What a parameter or field of that annotation is."""
        match annotation:
            case ast.Constant(value=str(text)):
                try:
                    return self.annotated(ast.parse(text, mode="eval").body)
                except SyntaxError:
                    return None
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.annotated(left) or self.annotated(right)
            case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
                return self.annotated(inner)
            case ast.Subscript(value=ast.Name(id="list" | "Sequence" | "Iterable" | "Iterator"), slice=inner):
                of = self.annotated(inner)
                return _Elements(of.cls) if isinstance(of, _Instance) else None
            case ast.Name() | ast.Attribute():
                known = self.value(annotation)
                kinds = self.surface.kinds(known.path).values() if isinstance(known, _Thing) else ()
                if isinstance(known, _Thing) and any(kind.startswith("class") for kind in kinds):
                    return _Instance(known.path)
        return None

    # --- uses ---

    def use(self, node: ast.AST, name: str, asked: bool = False) -> None:
        self.uses.append(Use(getattr(node, "lineno", 0), name, asked or self.forgiving > 0))

    def use_member(self, node: ast.AST, owner: _Value, attr: str, asked: bool = False) -> None:
        if attr.startswith("__") and attr.endswith("__") and attr != "__version__":
            return
        if isinstance(owner, _Instance) and attr in _OF_ENUMS and "class" in self.surface.kinds(owner.cls).values():
            return
        if isinstance(owner, _Instance):
            self.use(node, f"{owner.cls}.{attr}", asked)
        elif isinstance(owner, _Thing) and (
            self.surface.has_children_of_its_own(owner.path) or not self.surface.kinds(owner.path)
        ):
            self.use(node, f"{owner.path}.{attr}", asked)

    def use_module(self, node: ast.AST, module: str, asked: bool = False) -> None:
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            self.use(node, ".".join(parts[:length]), asked)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if is_comfyui(alias.name):
                self.use_module(node, alias.name)
                bound, path = (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
                self.scopes[-1][bound] = _Thing(path)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or node.module is None or not is_comfyui(node.module):
            return
        self.use_module(node, node.module)
        for alias in node.names:
            self.use(node, f"{node.module}.{alias.name}")
            self.scopes[-1][alias.asname or alias.name] = self.member(_Thing(node.module), alias.name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        self.use_member(node, self.value(node.value), node.attr)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        builtin = node.func.id if isinstance(node.func, ast.Name) else ""
        # getattr with a default and hasattr ask; a helper that is handed a module or class and a name is taken to ask, too.
        asks = builtin not in ("setattr", "delattr") and not (builtin == "getattr" and len(node.args) < 3)
        for owner, named in pairwise(node.args):
            known, name = self.value(owner), _literal(named)
            if name and name.isidentifier() and isinstance(known, (_Thing, _Instance)):
                self.use_member(node, known, name, asked=asks)
        module, name = (*map(_literal, node.args[:2]), None, None)[:2]
        if module and is_comfyui(module) and self.looks_like_module(node, module):
            self.use_module(node, module, asked=True)
            if name and name.isidentifier():
                self.use_member(node, _Thing(module), name, asked=True)

    def looks_like_module(self, node: ast.Call, module: str) -> bool:
        called = ast.unparse(node.func)
        imports = called.endswith(("import_module", "__import__", "find_spec", "sys.modules.get"))
        return imports or "module" in self.surface.kinds(module).values()

    def visit_Constant(self, node: ast.Constant) -> None:
        text = node.value
        if isinstance(text, str) and text.startswith(_SAFE_AS_STRING) and _DOTTED.fullmatch(text):
            self.use(node, text, asked=True)

    # --- what names come to mean ---

    def bind(self, target: ast.expr, known: _Value, cleared: bool) -> None:
        match target:
            case ast.Name(id=name):
                if known or cleared:
                    self.scopes[-1][name] = known
            case ast.Attribute(value=ast.Name(id="self"), attr=attr) if self.classes and known:
                self.fields[f"{self.classes[-1]}.{attr}"] = known

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        is_none = isinstance(node.value, ast.Constant) and node.value.value is None
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for inner, source in zip(target.elts, node.value.elts, strict=False):
                    self.bind(inner, self.value(source), cleared=True)
            else:
                # `x = None` beside `import ... as x` says that it may be absent, not that it is something else.
                self.bind(target, self.value(node.value), cleared=not is_none)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        known = self.annotated(node.annotation) or self.value(node.value)
        self.bind(node.target, known, cleared=node.value is not None)
        if self.classes and not self.functions and isinstance(node.target, ast.Name) and known:
            self.fields[f"{self.classes[-1]}.{node.target.id}"] = known

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self.bind(node.target, self.value(node.value), cleared=True)

    def bind_loop(self, target: ast.expr, iterated: ast.expr) -> None:
        over = self.value(iterated)
        self.bind(target, _Instance(over.cls) if isinstance(over, _Elements) else None, cleared=True)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self.bind_loop(node.target, node.iter)
        for inner in (*node.body, *node.orelse):
            self.visit(inner)

    visit_AsyncFor = visit_For  # noqa: N815

    def visit_comprehension_holder(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        self.scopes.append({})
        for generator in node.generators:
            self.visit(generator.iter)
            self.bind_loop(generator.target, generator.iter)
            for test in generator.ifs:
                self.visit(test)
        for result in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(result)
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_comprehension_holder  # noqa: N815

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        scope: dict[str, _Value] = {}
        for argument in _arguments(node.args):
            if argument.annotation:
                self.visit(argument.annotation)
            scope[argument.arg] = self.annotated(argument.annotation)
        if node.returns:
            self.visit(node.returns)
        if not self.classes:
            self.results.setdefault(node.name, self.annotated(node.returns))
        forgiving, self.forgiving = self.forgiving, 0  # a body runs later, outside the try around its definition
        self.scopes.append(scope)
        self.functions.append(node.name)
        for inner in node.body:
            self.visit(inner)
        self.functions.pop()
        self.scopes.pop()
        self.forgiving = forgiving

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Return(self, node: ast.Return) -> None:
        self.generic_visit(node)
        known = self.value(node.value)
        if self.functions and known and not self.classes:
            self.results[self.functions[-1]] = known

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.scopes.append({argument.arg: None for argument in _arguments(node.args)})
        self.visit(node.body)
        self.scopes.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for outside in (*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)):
            self.visit(outside)
        functions, self.functions = self.functions, []
        self.classes.append(node.name)
        self.scopes.append({})
        for inner in node.body:
            self.visit(inner)
        # A class scope is not seen from its methods; they were visited with it in reach only to keep this simple.
        self.scopes.pop()
        self.classes.pop()
        self.functions = functions

    # --- where absence is coped with ---

    def visit_Try(self, node: ast.Try) -> None:
        forgives = any(_names(handler.type) & _FORGIVING or handler.type is None for handler in node.handlers)
        self.forgiving += forgives
        for inner in node.body:
            self.visit(inner)
        self.forgiving -= forgives
        for inner in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(inner)

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.visit(item)
        forgives = any(
            isinstance(item.context_expr, ast.Call)
            and ast.unparse(item.context_expr.func).endswith("suppress")
            and any(_names(argument) & _FORGIVING for argument in item.context_expr.args)
            for item in node.items
        )
        self.forgiving += forgives
        for inner in node.body:
            self.visit(inner)
        self.forgiving -= forgives

    visit_AsyncWith = visit_With  # noqa: N815


def _arguments(arguments: ast.arguments) -> Iterator[ast.arg]:
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    yield from filter(None, (arguments.vararg, arguments.kwarg))


def _literal(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _names(node: ast.expr | None) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} if node else set()
