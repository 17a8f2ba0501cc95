"""Numerical verdicts without hand-tuned tolerances.

The rule of the contract: against a float64 reference, the error is at most twice the stock operator's own error in the
same dtype and precision mode, plus one rounding step. In symbols, for the maximum norm and for the Euclidean norm,

    ||actual - ref||  <=  2 * ||stock - ref||  +  ||step||

where ``step`` is one unit of rounding per element. The size of a rounding step depends on the sum. The result is
rounded to its dtype at its own magnitude, but a sum is rounded at the magnitude of its partial sums. If terms cancel,
these are much larger than the result. On a large tensor that does not matter: stock's maximum error over thousands of
elements already measures it. On a tensor of a few elements stock's error may be zero by luck. So:

* without ``magnitude``, the step is ``eps(dtype)`` at the largest (max norm) or root-sum-square (l2 norm) reference;
* with ``magnitude`` (the same operator in float64 on absolute values: sum of ``|a| * |b|``), the step of element i is
  ``eps(dtype) * |ref_i| + eps(accumulator) * magnitude_i``, and the maximum-norm rule is also applied **element by
  element**, which catches an error in small elements that the largest element would hide.

NaN and infinities have no error: their positions must be those of the reference rounded to the dtype. There is one
exception: an overflow may go either way if stock overflows too, or if the reference lies within a rounding step of the
largest finite number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = [
    "JudgeError",
    "Verdict",
    "assert_as_accurate",
    "assert_bitwise_equal",
    "assert_same_values",
    "exact_grid",
    "ulp",
]

_WORST = 10
_NAN, _POS_INF, _NEG_INF, _FINITE = 1, 2, 3, 0
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ACCUMULATOR_EPS = {"ieee": 2.0**-23, "tf32": 2.0**-10}


class JudgeError(ValueError):
    """The comparison itself makes no sense (mismatched, empty or meaningless inputs): the test is at fault."""


@dataclass(frozen=True)
class Verdict:
    """What was measured: errors against the float64 reference in both norms, and what was allowed."""

    actual_max: float
    stock_max: float
    allowed_max: float
    actual_l2: float
    stock_l2: float
    allowed_l2: float
    elements: int

    @property
    def ratio(self) -> float:
        """How much of the allowance was used, the worse of the two norms; above 1 is a failure."""
        pairs = ((self.actual_max, self.allowed_max), (self.actual_l2, self.allowed_l2))
        return max(0.0 if e == 0 else (math.inf if a == 0 else e / a) for e, a in pairs)


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbouring numbers of ``dtype`` at the magnitude of ``values``, in float64."""
    info = torch.finfo(dtype)
    magnitude = values.detach().double().abs().clamp_min(info.smallest_normal)
    _, exponent = torch.frexp(magnitude)
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent - 1)


def _kind(values: torch.Tensor) -> torch.Tensor:
    kind = torch.zeros(values.shape, dtype=torch.int8, device=values.device)
    kind[values.isnan()] = _NAN
    kind[values == math.inf] = _POS_INF
    kind[values == -math.inf] = _NEG_INF
    return kind


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))


def _listing(
    order: torch.Tensor, actual: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype
) -> list[str]:
    """Table of the elements whose flat positions ``order`` gives."""
    lines = [f"  {'index':>20} {'actual':>16} {'stock':>16} {'reference':>16} {'error':>11} {'in ulps':>11}"]
    flat = [t.detach().reshape(-1).double() for t in (actual, stock, reference)]
    for position in order.tolist():
        a, s, r = (float(t[position]) for t in flat)
        error = abs(a - r)
        steps = error / float(ulp(torch.tensor(r if math.isfinite(r) else 1.0), dtype))
        index = str(_index(position, reference.shape))
        lines.append(f"  {index:>20} {a:>16.8g} {s:>16.8g} {r:>16.8g} {error:>11.3g} {steps:>11.4g}")
    return lines


def _check_comparable(
    actual: torch.Tensor,
    stock: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype,
    magnitude: torch.Tensor | None,
) -> None:
    if not dtype.is_floating_point:
        raise JudgeError(f"dtype must be a floating-point dtype, got {dtype}")
    for name, tensor, wanted in (
        ("actual", actual, dtype),
        ("stock", stock, dtype),
        ("reference64", reference, torch.float64),
        ("magnitude", magnitude, torch.float64),
    ):
        if tensor is None:
            continue
        if tensor.dtype != wanted:
            raise JudgeError(f"{name} has dtype {tensor.dtype}, expected {wanted}")
        if tensor.shape != reference.shape:
            raise JudgeError(f"{name} has shape {tuple(tensor.shape)}, the reference has {tuple(reference.shape)}")


def assert_as_accurate(
    actual: torch.Tensor,
    stock: torch.Tensor,
    reference64: torch.Tensor,
    *,
    dtype: torch.dtype,
    magnitude: torch.Tensor | None = None,
    precision: Literal["ieee", "tf32"] = "ieee",
    allow_zero: bool = False,
    allow_empty: bool = False,
    allow_nonfinite: bool = False,
    name: str = "",
) -> Verdict:
    """Assert that ``actual`` is as accurate as stock PyTorch, by the contract's rule (see the module's docstring).

    Args:
        actual: the result on trial, in ``dtype``.
        stock: stock PyTorch's result from the same inputs, in ``dtype`` and the same precision mode.
        reference64: stock PyTorch's result from the same inputs converted to float64.
        dtype: what both results must have.
        magnitude: the accumulated magnitude of every element in float64 (the operator, without relu, on absolute
            values). Makes the rule sound on tiny tensors and sharp element by element.
        precision: mode of the products, ``tf32`` where stock ran in it too. Only used with ``magnitude``.
        allow_zero: accept a reference of nothing but zeros.
        allow_empty: accept tensors without elements.
        allow_nonfinite: accept a reference without a single finite element.
        name: what is compared, for the message.

    Returns:
        The measured errors and allowances.

    Raises:
        JudgeError: the comparison would say nothing (shapes, dtypes, empty, all zero, stock and reference unrelated).
        AssertionError: ``actual`` is less accurate than allowed, with the worst elements listed.
    """
    label = f"{name}: " if name else ""
    actual, stock, reference = actual.detach().cpu(), stock.detach().cpu(), reference64.detach().cpu()
    magnitude = None if magnitude is None else magnitude.detach().cpu().abs()
    _check_comparable(actual, stock, reference, dtype, magnitude)
    count = reference.numel()
    if count == 0:
        if not allow_empty:
            raise JudgeError(f"{label}nothing to compare in {tuple(reference.shape)} (pass allow_empty=True if meant)")
        return Verdict(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    if not allow_zero and not bool((reference != 0).any()):
        raise JudgeError(f"{label}the reference is zero everywhere (pass allow_zero=True if meant)")

    info = torch.finfo(dtype)
    head = f"{label}{tuple(reference.shape)} {dtype}"
    kinds = [_kind(t) for t in (actual, stock, reference, reference.to(dtype))]
    actual_kind, stock_kind, reference_kind, rounded_kind = kinds
    legal = actual_kind == rounded_kind
    # Overflow is a matter of rounding: where the exact result is finite, follow the rounded reference or stock.
    exact_is_finite = reference_kind == _FINITE
    legal |= exact_is_finite & (actual_kind == stock_kind)
    edge = exact_is_finite & ((reference.abs() - info.max).abs() <= info.eps * info.max)
    own_infinity = torch.where(reference > 0, _POS_INF, _NEG_INF)
    legal |= edge & ((actual_kind == _FINITE) | (actual_kind == own_infinity))
    if not bool(legal.all()):
        wrong = (~legal).reshape(-1).nonzero().reshape(-1)
        lines = [f"{head}: NaN or infinity in other places than the reference's, {wrong.numel()} of {count} elements:"]
        raise AssertionError("\n".join(lines + _listing(wrong[:_WORST], actual, stock, reference, dtype)))

    finite = exact_is_finite & (actual_kind == _FINITE)
    if not bool(finite.any()):
        if not allow_nonfinite:
            raise JudgeError(f"{label}no element is finite (pass allow_nonfinite=True if meant)")
        return Verdict(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, count)
    zero = torch.zeros((), dtype=torch.float64)
    ref = torch.where(finite, reference, zero)
    actual_error = torch.where(finite, actual.double() - reference, zero).abs()
    stock_error = torch.where(finite & (stock_kind == _FINITE), stock.double() - reference, zero).abs()
    step = info.eps * ref.abs()
    if magnitude is not None:
        step = step + _ACCUMULATOR_EPS[precision] * torch.where(finite, magnitude, zero)
    # Results below the smallest normal number are rounded to a fixed step (or flushed to zero by fast hardware).
    floor = info.smallest_normal if dtype == torch.float32 else info.smallest_normal * info.eps
    step = torch.where(finite, step.clamp_min(floor), zero)

    scale = float((ref if magnitude is None else torch.where(finite, magnitude, zero)).norm())
    stock_l2 = float(stock_error.norm())
    if stock_l2 > 0.5 * scale + float(step.norm()):
        raise JudgeError(
            f"{head}: stock's own error {stock_l2:.3g} is more than half of the reference's norm {scale:.3g}: "
            "stock and reference were not computed from the same inputs, or the data make the comparison meaningless"
        )
    actual_max, stock_max = float(actual_error.max()), float(stock_error.max())
    verdict = Verdict(
        actual_max=actual_max,
        stock_max=stock_max,
        allowed_max=2 * stock_max + float(step.max()),
        actual_l2=float(actual_error.norm()),
        stock_l2=stock_l2,
        allowed_l2=2 * stock_l2 + float(step.norm()),
        elements=count,
    )
    limit = verdict.allowed_max if magnitude is None else 2 * stock_max + step
    over = actual_error > limit
    if verdict.ratio <= 1 and not bool(over.any()):
        return verdict
    order = (actual_error / ulp(ref, dtype)).reshape(-1) if magnitude is not None else actual_error.reshape(-1)
    if bool(over.any()):
        order = torch.where(over.reshape(-1), order, -1.0)
    worst = order.argsort(descending=True)[: min(_WORST, count)]
    lines = [
        f"{head}: less accurate than stock allows (error <= 2 x stock's + one rounding step)",
        f"  max norm: {verdict.actual_max:.4g}, stock {verdict.stock_max:.4g}, allowed {verdict.allowed_max:.4g}",
        f"  l2 norm:  {verdict.actual_l2:.4g}, stock {verdict.stock_l2:.4g}, allowed {verdict.allowed_l2:.4g}",
        f"  {int(over.sum())} of {count} elements are beyond the limit; the worst:",
    ]
    raise AssertionError("\n".join(lines + _listing(worst, actual, stock, reference, dtype)))


def _differing(actual: torch.Tensor, expected: torch.Tensor, same: torch.Tensor, what: str, name: str) -> None:
    if bool(same.all()):
        return
    wrong = (~same).reshape(-1).nonzero().reshape(-1)
    label = f"{name}: " if name else ""
    head = f"{label}{tuple(actual.shape)} {actual.dtype}"
    lines = [f"{head}: {what} in {wrong.numel()} of {same.numel()} elements; the first:"]
    lines.append(f"  {'index':>20} {'actual':>16} {'expected':>16}")
    a, e = actual.reshape(-1), expected.reshape(-1)
    lines += [f"  {_index(i, actual.shape)!s:>20} {a[i].item():>16} {e[i].item():>16}" for i in wrong[:_WORST].tolist()]
    raise AssertionError("\n".join(lines))


def _pair(actual: torch.Tensor, expected: torch.Tensor, allow_empty: bool) -> tuple[torch.Tensor, torch.Tensor]:
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise JudgeError(
            f"cannot compare {tuple(actual.shape)} {actual.dtype} with {tuple(expected.shape)} {expected.dtype}"
        )
    if actual.numel() == 0 and not allow_empty:
        raise JudgeError(f"nothing to compare: shape {tuple(actual.shape)} (pass allow_empty=True if meant)")
    return actual, expected


def assert_bitwise_equal(
    actual: torch.Tensor, expected: torch.Tensor, *, allow_empty: bool = False, name: str = ""
) -> None:
    """Assert equality of every bit (NaN payloads and the sign of zero included): for reproducibility."""
    actual, expected = _pair(actual, expected, allow_empty)
    raw = _INT_OF_SIZE[actual.element_size()]
    same = actual.contiguous().view(raw) == expected.contiguous().view(raw)
    _differing(actual, expected, same, "bits differ", name)


def assert_same_values(
    actual: torch.Tensor, expected: torch.Tensor, *, allow_empty: bool = False, name: str = ""
) -> None:
    """Assert equality of every value, NaN equal to NaN and -0 equal to 0: for data on an exact grid."""
    actual, expected = _pair(actual, expected, allow_empty)
    _differing(actual, expected, (actual == expected) | (actual.isnan() & expected.isnan()), "values differ", name)


def exact_grid(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    *,
    terms: int = 512,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Random small dyadic numbers whose products, and sums of ``terms`` products, are exact in ``dtype``.

    Results computed from them do not depend on the order of summation, so that a fused and a stock operator must agree
    in every value; and equal results are frequent, which puts the tie rule of max-pooling to the test.

    The numbers are ``m / 2**s`` with integers ``|m| <= 2**s``: products lie on a grid of ``4**-s``, and a sum is exact
    while it stays within the significand's range of grid steps. The number of levels is the largest power of two that
    keeps 6.5 standard deviations of the sum inside that range, but not more than 2, for the sake of ties (for very
    many terms in a narrow dtype also the density of nonzeros is lowered). So an inexact sum is not impossible but never
    seen.
    """
    if not dtype.is_floating_point:
        raise JudgeError(f"exact_grid needs a floating-point dtype, got {dtype}")
    reach = 2.0 / torch.finfo(dtype).eps  # integers up to here are exact
    levels, density = 1, 1.0
    for candidate in (2, 1):
        levels = candidate
        spread = 6.5 * math.sqrt(max(terms, 1)) * candidate * (candidate + 1) / 3
        if spread <= reach:
            break
    else:
        density = reach / spread
    integers = torch.randint(-levels, levels + 1, shape, generator=generator)
    if density < 1.0:
        integers = integers * (torch.rand(shape, generator=generator) < density)
    return (integers.double() / levels).to(device=device, dtype=dtype)
