"""``Box``: a half-open rectangle of pixels, order (y, x)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, int]


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is at least ``value``."""
    return -(-value // step) * step


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Pixels ``y0 <= y < y1``, ``x0 <= x < x1``; may leave the image, never negative in size."""

    y0: int
    x0: int
    y1: int
    x1: int

    def __post_init__(self) -> None:
        if self.y1 < self.y0 or self.x1 < self.x0:
            raise ValueError(f"box of negative size: y {self.y0}:{self.y1}, x {self.x0}:{self.x1}")

    @classmethod
    def of_shape(cls, shape: Shape) -> Box:
        """Return the box of an image of ``shape`` (y, x) px."""
        return cls(0, 0, shape[0], shape[1])

    @property
    def shape(self) -> Shape:
        """Sides (y, x) in px."""
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def area(self) -> int:
        """Pixels inside."""
        return (self.y1 - self.y0) * (self.x1 - self.x0)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Slices (y, x) that read the box from an array whose origin is (0, 0)."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def __str__(self) -> str:
        return f"y {self.y0}:{self.y1}, x {self.x0}:{self.x1}"

    def grow(self, px: int) -> Box:
        """Return the box with ``px`` more on each side."""
        return Box(self.y0 - px, self.x0 - px, self.y1 + px, self.x1 + px)

    def shift(self, dy: int, dx: int) -> Box:
        """Return the box moved by (dy, dx) px."""
        return Box(self.y0 + dy, self.x0 + dx, self.y1 + dy, self.x1 + dx)

    def intersect(self, other: Box) -> Box:
        """Return what both cover; an empty box (area 0) where they do not meet."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        return Box(y0, x0, max(y0, min(self.y1, other.y1)), max(x0, min(self.x1, other.x1)))

    def contains(self, other: Box) -> bool:
        """Tell whether ``other`` lies inside."""
        return (
            self.y0 <= other.y0
            and self.x0 <= other.x0
            and other.y1 <= self.y1
            and other.x1 <= self.x1
        )

    def reduced(self, factor: int) -> Box:
        """Return the box of coarse pixels that touch this one, sizes rounded up."""
        return Box(
            self.y0 // factor,
            self.x0 // factor,
            -(-self.y1 // factor),
            -(-self.x1 // factor),
        )

    def enlarged(self, factor: int) -> Box:
        """Return the box of fine pixels under this one."""
        return Box(self.y0 * factor, self.x0 * factor, self.y1 * factor, self.x1 * factor)

    def split(self, side: Shape) -> Iterator[Box]:
        """Cut the box into pieces of ``side`` (y, x) px from its corner; the last are clipped."""
        for y0 in range(self.y0, self.y1, side[0]):
            for x0 in range(self.x0, self.x1, side[1]):
                yield Box(y0, x0, min(y0 + side[0], self.y1), min(x0 + side[1], self.x1))
