"""Arithmetic that a graph carries in a widget (`floor(a * b) + 1`), evaluated without running any code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

Number = int | float

MAX_LENGTH: Final = 500
MAX_EXPONENT: Final = 4000
"""As ComfyUI's own node caps it (comfy_extras/nodes_math.py)."""

MAX_SHIFT: Final = 1000
"""What is shifted further has no finite value as a float anyway."""

_BINARY: Final[dict[type[ast.operator], Callable[[Number, Number], Number]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: lambda number, bits: _shift(number, bits),
    ast.RShift: operator.rshift,
}
_UNARY: Final[dict[type[ast.unaryop], Callable[[Any], Any]]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_COMPARE: Final[dict[type[ast.cmpop], Callable[[Number, Number], bool]]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "float": float,
    "floor": math.floor,
    "int": int,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": round,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "sum": lambda *values: sum(values),
    "tan": math.tan,
}


class ExpressionError(ValueError):
    """The expression is not arithmetic we know, or has no finite value; the message says why."""


def evaluate(expression: str, names: Mapping[str, Number]) -> Number:
    """The value of `expression` with `names` as its variables. Raises ExpressionError, nothing else."""
    if len(expression) > MAX_LENGTH:
        raise ExpressionError(f"an expression of {len(expression)} characters is not evaluated")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, names)
        # an integer too large for a float is refused here too: it overflows
        finite = math.isfinite(value)
    except ExpressionError:
        raise
    except (SyntaxError, ArithmeticError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"{expression!r} can't be evaluated: {error}") from None
    if not finite:
        raise ExpressionError(f"{expression!r} has no finite value")
    return value


def _value(node: ast.expr, names: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=bool() | int() | float() as constant):
            return constant
        case ast.Name(id=name):
            if name not in names:
                raise ExpressionError(f"{name} has no value")
            return names[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, names), _value(right, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand, names))
        case ast.Compare(left=left, ops=ops, comparators=rights) if all(type(op) in _COMPARE for op in ops):
            values = [_value(left, names), *(_value(right, names) for right in rights)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        case ast.BoolOp(op=op, values=parts):
            ends_it = isinstance(op, ast.Or)
            value: Number = not ends_it
            for part in parts:
                value = _value(part, names)
                if bool(value) == ends_it:
                    break
            return value
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body, names) if _value(test, names) else _value(orelse, names)
        case ast.Call(func=ast.Name(id="pow"), args=[base, exponent], keywords=[]):
            return _power(_value(base, names), _value(exponent, names))
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]) if function in _FUNCTIONS:
            return _FUNCTIONS[function](*(_value(argument, names) for argument in arguments))
    raise ExpressionError(f"{ast.unparse(node)!r} is no arithmetic")


def _shift(number: Number, bits: Number) -> Number:
    if not isinstance(number, int) or not isinstance(bits, int) or bits > MAX_SHIFT:
        raise ExpressionError(f"{number} << {bits} is not evaluated")
    return number << bits


def _power(base: Number, exponent: Number) -> Number:
    if abs(exponent) > MAX_EXPONENT or abs(base) > 1e100:
        raise ExpressionError(f"{base} ** {exponent} is not evaluated")
    result = base**exponent
    if isinstance(result, complex):
        raise ExpressionError(f"{base} ** {exponent} is not real")
    return result
