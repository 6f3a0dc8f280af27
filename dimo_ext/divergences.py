"""Names of f-divergences: frozen dataclasses that hold a divergence's parameters, and their string form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._checks import check_number, require


@dataclass(frozen=True)
class Divergence:
    """The base of all divergences: D_f(p ‖ q) = Σ_v q_v f(p_v / q_v) with f convex and f(1) = 0.

    p is the teacher's distribution of a token, q the auxiliary's. Operators take an object or its string:

    - ``ForwardKL()`` or ``"forward_kl"``
    - ``ReverseKL()`` or ``"reverse_kl"``
    - ``Jeffreys(beta)`` or ``"jeffreys:<beta>"``
    - ``JensenShannon(pi)`` or ``"jensen_shannon:<pi>"``; pi is 0.5 where it is left out
    - ``SquaredHellinger()`` or ``"squared_hellinger"``
    - ``TotalVariation()`` or ``"total_variation"``
    - ``PearsonChi2()`` or ``"pearson_chi2"``
    - ``NeymanChi2()`` or ``"neyman_chi2"``
    - ``Alpha(alpha)`` or ``"alpha:<alpha>"``
    - ``LeCam()`` or ``"le_cam"``

    A parameter that is no number in its range raises ValueError or TypeError.

    Example:
        >>> str(Jeffreys(-0.2))
        'jeffreys:-0.2'
        >>> JensenShannon()
        JensenShannon(pi=0.5)
        >>> names = ["forward_kl", "reverse_kl", "jeffreys:0.5", "jensen_shannon", "squared_hellinger",
        ...          "total_variation", "pearson_chi2", "neyman_chi2", "alpha:2", "le_cam"]
        >>> p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
        >>> for name in names:
        ...     print(f"{name:18}{token_divergence(p.log(), q.log(), name):.4f}")
        forward_kl        0.0851
        reverse_kl        0.0920
        jeffreys:0.5      0.0886
        jensen_shannon    0.0219
        squared_hellinger 0.0440
        total_variation   0.2000
        pearson_chi2      0.1633
        neyman_chi2       0.2071
        alpha:2           0.0817
        le_cam            0.0867
    """

    name: ClassVar[str] = ""
    parameters: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        """Return the canonical string, e.g. ``jeffreys:-0.2``."""
        return ":".join([self.name, *(repr(getattr(self, p)) for p in self.parameters)])


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p ‖ q), f(u) = u log u; covers the teacher's modes."""

    name: ClassVar[str] = "forward_kl"


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q ‖ p), f(u) = -log u; seeks modes, infinite where the teacher has probability 0."""

    name: ClassVar[str] = "reverse_kl"


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """(1 - beta) KL(p ‖ q) + beta KL(q ‖ p) for any real beta; not a divergence (can be negative) outside [0, 1]."""

    beta: float
    name: ClassVar[str] = "jeffreys"
    parameters: ClassVar[tuple[str, ...]] = ("beta",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", check_number(self.beta, "beta"))


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """pi KL(p ‖ m) + (1 - pi) KL(q ‖ m) with m = pi p + (1 - pi) q, 0 < pi < 1; bounded."""

    pi: float = 0.5
    name: ClassVar[str] = "jensen_shannon"
    parameters: ClassVar[tuple[str, ...]] = ("pi",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pi", check_number(self.pi, "pi"))
        require(0.0 < self.pi < 1.0, "pi", "a number in (0, 1)", self.pi)


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """Σ (√p - √q)², in [0, 2]."""

    name: ClassVar[str] = "squared_hellinger"


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½ Σ |p - q|, in [0, 1]; subgradient 0 where p = q."""

    name: ClassVar[str] = "total_variation"


@dataclass(frozen=True)
class PearsonChi2(Divergence):
    """Σ (p - q)² / q; overflows to +inf where q is far below p."""

    name: ClassVar[str] = "pearson_chi2"


@dataclass(frozen=True)
class NeymanChi2(Divergence):
    """Σ (p - q)² / p; overflows to +inf where p is far below q."""

    name: ClassVar[str] = "neyman_chi2"


@dataclass(frozen=True)
class Alpha(Divergence):
    """Amari's α-divergence (Σ p^α q^(1-α) - 1) / (α (α - 1)), α not 0 or 1 (those limits are the two KLs)."""

    alpha: float
    name: ClassVar[str] = "alpha"
    parameters: ClassVar[tuple[str, ...]] = ("alpha",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", check_number(self.alpha, "alpha"))
        for limit, name in ((0.0, "ReverseKL()"), (1.0, "ForwardKL()")):
            if abs(self.alpha - limit) < 1e-3:  # nearer, the formula cancels in float32
                expected = "a number other than 0 and 1, at least 0.001 away from them"
                raise ValueError(f"alpha: expected {expected}, got {self.alpha}: use {name}")


@dataclass(frozen=True)
class LeCam(Divergence):
    """Σ (p - q)² / (p + q), the triangular discrimination, in [0, 2]."""

    name: ClassVar[str] = "le_cam"


DIVERGENCES: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (
        ForwardKL, ReverseKL, Jeffreys, JensenShannon, SquaredHellinger,
        TotalVariation, PearsonChi2, NeymanChi2, Alpha, LeCam,
    )
}  # fmt: skip


def parse_divergence(divergence: str | Divergence) -> Divergence:
    """Return the divergence that a string names: ``"forward_kl"``, ``"jeffreys:-0.2"``, ``"jensen_shannon:0.3"``.

    Args:
        divergence: a name, a colon and the parameter where there is one; an object is returned as it is.

    Returns:
        The divergence, an object of a subclass of :class:`Divergence`.

    Raises:
        TypeError: neither a string nor a divergence.
        ValueError: an unknown name (the valid ones are listed), a missing, surplus or malformed parameter.

    Example:
        >>> parse_divergence("jeffreys:-0.2")
        Jeffreys(beta=-0.2)
        >>> parse_divergence("jensen_shannon")
        JensenShannon(pi=0.5)
    """
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(f"divergence: expected a Divergence or its string, got {type(divergence).__name__}")
    name, *values = divergence.split(":")
    if name not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    cls = DIVERGENCES[name]
    required = sum(not hasattr(cls, p) for p in cls.parameters)  # one with a default is a class attribute
    if not required <= len(values) <= len(cls.parameters):
        form = ":".join([name, *cls.parameters])
        raise ValueError(f"divergence: expected the form {form!r}, got {divergence!r}")
    try:
        numbers = [float(v) for v in values]
    except ValueError:
        raise ValueError(f"divergence: expected a number after {name!r}:, got {divergence!r}") from None
    return cls(*numbers)
