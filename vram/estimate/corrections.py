"""The backend as estimates take it: checked, and what the self-check traced on it laid over an estimate of the closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Final, get_args

from .backend import NEWEST_TRACED, Allocator, Attention, Backend, Correction
from .estimate import Estimate, Term
from .tokens import flag, one_of, short, typed, whole

MOST_FACTOR: Final = 1000
"""No trace is so far from a closed form that one could speak of a correction."""


def checked(backend: object) -> Backend:
    """`backend` as it is; None is one of which nothing is known. Raises ValueError that names what in it is out of range."""
    if backend is None:
        return Backend()
    typed("backend", backend, Backend)
    assert isinstance(backend, Backend)
    version_of(backend.comfyui)
    for name, known in (("fused_rope", backend.fused_rope), ("fused_rms_norm", backend.fused_rms_norm)):
        if known is not None:
            flag(name, known)
    one_of("attention", backend.attention, get_args(Attention))
    one_of("allocator", backend.allocator, get_args(Allocator))
    flag("compiled", backend.compiled)
    flag("slow_conv3d", backend.slow_conv3d)
    whole("element_bytes", backend.element_bytes, 1, 8)
    whole("vae_element_bytes", backend.vae_element_bytes, 1, 8)
    if backend.weight_bytes is not None:
        whole("weight_bytes", backend.weight_bytes, 1, 8)
    if not isinstance(backend.corrections, tuple) or not all(isinstance(one, Correction) for one in backend.corrections):
        raise ValueError("corrections must be a tuple of Correction")
    for one in backend.corrections:
        _fraction(one.factor)
        typed("corrections of a kind", one.kind, str)
        typed("corrections by a host", one.host, str)
    return backend


def version_of(comfyui: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """The version that forms are chosen by: the newest that was traced where it is not known. Raises ValueError naming it."""
    if comfyui is None:
        return NEWEST_TRACED
    if not isinstance(comfyui, tuple) or len(comfyui) != 3:
        raise ValueError(f"comfyui must be three numbers, not {short(comfyui)}")
    for part in comfyui:
        whole("comfyui", part, 0, 1 << 31)
    return comfyui


def corrected(estimate: Estimate, kind: str, backend: Backend) -> Estimate:
    """`estimate` times what the self-check found for this kind of forward, with a sentence that says so.

    Terms are rounded so that they still sum to the expected value. Raises ValueError that names `corrections` for a factor that
    is no positive number.
    """
    for found in backend.corrections:
        if found.kind != kind:
            continue
        factor = _fraction(found.factor)
        lowest = factor if found.lowest is None else min(factor, _fraction(found.lowest))
        if factor == 1:
            continue
        terms = scaled_terms(estimate.terms, factor)
        expected = sum(term.bytes for term in terms)
        said = f"Rescaled by {found.factor:.3f} to what the installed {found.host} was traced to need."
        estimate = replace(
            estimate,
            expected=expected,
            lower=min(expected, math.floor(estimate.lower * lowest)),
            upper=max(expected, math.ceil(estimate.upper * factor)),
            terms=terms,
            assumptions=(*estimate.assumptions, said),
        )
    return estimate


def scaled_terms(terms: tuple[Term, ...], factor: Fraction) -> tuple[Term, ...]:
    """Every term times `factor`; the roundings add up to less than one byte."""
    made: list[Term] = []
    before = after = 0
    for term in terms:
        before += term.bytes
        share = round(before * factor) - after
        after += share
        if share:
            made.append(Term(term.name, share))
    return tuple(made)


def _fraction(factor: object) -> Fraction:
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 / MOST_FACTOR <= factor <= MOST_FACTOR:
        raise ValueError(f"corrections must have factors from 1/{MOST_FACTOR} to {MOST_FACTOR}, not {short(factor)}")
    return Fraction(factor)
