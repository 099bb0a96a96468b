"""Numbers, texts, switches and sums."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from . import node


@node("PrimitiveInt")
def primitive_int(value: int) -> tuple[int]:
    return (value,)


@node("PrimitiveFloat")
def primitive_float(value: float) -> tuple[float]:
    return (value,)


@node("PrimitiveBoolean")
def primitive_boolean(value: bool) -> tuple[bool]:
    return (value,)


@node("PrimitiveString")
def primitive_string(value: str) -> tuple[str]:
    return (value,)


@node("PrimitiveStringMultiline")
def primitive_multiline(value: str) -> tuple[str]:
    return (value,)


def _wanted(self: Any, switch: bool, on_false: Any = None, on_true: Any = None) -> list[str]:
    name, value = ("on_true", on_true) if switch else ("on_false", on_false)
    return [name] if value is None else []


@node("ComfySwitchNode", check_lazy_status=_wanted)
def switch_node(switch: bool, on_false: Any = None, on_true: Any = None) -> tuple[Any]:
    return (on_true if switch else on_false,)


@node("PreviewAny", "main")
def preview_any(source: Any = None) -> dict[str, Any]:
    return {"ui": {"text": (str(source),)}, "result": (str(source),)}


OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
    "round": round,
    "abs": abs,
    "min": min,
    "max": max,
    "int": int,
    "float": float,
    "pow": pow,
}


def evaluate(expression: str, names: dict[str, Any]) -> Any:
    """A sum over named numbers; anything but arithmetic, comparison, and/or, if/else and a few functions is refused."""

    def value(part: ast.AST) -> Any:
        if isinstance(part, ast.Constant) and isinstance(part.value, int | float):
            return part.value
        if isinstance(part, ast.Name) and part.id in names:
            return names[part.id]
        if isinstance(part, ast.BinOp) and type(part.op) in OPERATORS:
            return OPERATORS[type(part.op)](value(part.left), value(part.right))
        if isinstance(part, ast.UnaryOp) and type(part.op) in OPERATORS:
            return OPERATORS[type(part.op)](value(part.operand))
        if isinstance(part, ast.Compare) and len(part.ops) == 1 and type(part.ops[0]) in OPERATORS:
            return OPERATORS[type(part.ops[0])](value(part.left), value(part.comparators[0]))
        if isinstance(part, ast.BoolOp):
            return (all if isinstance(part.op, ast.And) else any)(value(one) for one in part.values)
        if isinstance(part, ast.IfExp):
            return value(part.body) if value(part.test) else value(part.orelse)
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in FUNCTIONS:
            return FUNCTIONS[part.func.id](*(value(one) for one in part.args))
        raise ValueError(f"not arithmetic: {ast.unparse(part)}")

    return value(ast.parse(expression, mode="eval").body)


@node("ComfyMathExpression")
def math_expression(expression: str, **values: Any) -> tuple[float, int, bool]:
    result = evaluate(expression, {name.removeprefix("values."): value for name, value in values.items()})
    return float(result), int(result), bool(result)
