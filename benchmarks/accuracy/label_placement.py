"""Names at the points of a picture, put where they cover neither each other nor what is drawn."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

__all__ = ["Label", "place_labels"]

FONT_SIZE = 7.5
DISTANCES = (7, 16, 26, 38, 52, 68, 86)  # points of 1/72 inch
# Degrees: beside the point first, then above and below it, then askew.
ANGLES = (0, 180, 90, 270, 35, 325, 145, 215, 60, 300, 120, 240, 15, 345, 165, 195)
LEADER_FROM = 10  # points; a name farther off has a line to its point
POINT_RADIUS = 4.5  # points
PADDING = 3  # pixels
SAMPLES = 60  # points along a line
SWEEPS = 3
PREFERENCE = 0.1  # square pixels that a place nearer to the point is worth


@dataclass(frozen=True)
class Label:
    """A text at a point, both in the units of the data."""

    text: str
    x: float
    y: float
    color: str


def place_labels(axes: Any, labels: Sequence[Label], lines: Sequence[Sequence[tuple[float, float]]] = ()) -> None:
    """Write the labels into axes, each as near to its point as is free; `lines` are to be left visible.

    Limits and scales must be final, and the figure laid out by `draw_without_rendering`: places depend on both. Where
    no place is free, the text goes where it covers least.
    """
    if not labels:
        return
    pixels, renderer = axes.figure.dpi / 72, FigureCanvasAgg(axes.figure).get_renderer()
    texts = [
        axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", ha="center", va="center",
            fontsize=FONT_SIZE, color=label.color,
        )
        for label in labels
    ]  # fmt: skip
    points = axes.transData.transform([(label.x, label.y) for label in labels])
    marks = np.concatenate([points - POINT_RADIUS * pixels, points + POINT_RADIUS * pixels], axis=1)
    drawn = [_along(axes.transData.transform(line)) for line in lines]
    offsets, sides = _directions()
    places = []
    for text, point in zip(texts, points, strict=True):
        text.set_in_layout(False)
        size = np.array(text.get_window_extent(renderer).size)
        near = point + offsets * pixels  # where the text faces its point
        middles = near + sides * size / 2
        boxes = np.concatenate([middles - size / 2, middles + size / 2], axis=1)
        leaders = np.stack([_along(np.stack([point, end])) for end in near])
        places.append((middles, boxes, leaders))
    far = np.hypot(*offsets.T) > LEADER_FROM
    room = np.array(axes.get_window_extent().extents)
    chosen: dict[int, int] = {}
    # Once more when all have one: what came first may make room for what came later.
    for _, index in itertools.product(range(SWEEPS), range(len(labels))):
        others = {other: places[other] for other in chosen if other != index}
        taken = np.stack([*marks, *(boxes[chosen[other]] for other, (_, boxes, _) in others.items())])
        seen = [leaders[chosen[other]] for other, (_, _, leaders) in others.items() if far[chosen[other]]]
        _, boxes, leaders = places[index]
        bad = _covered(boxes, np.where(far[:, None, None], leaders, np.nan), room, taken, index, [*drawn, *seen])
        chosen[index] = int((bad + PREFERENCE * np.arange(len(bad))).argmin())
    for index, (text, label) in enumerate(zip(texts, labels, strict=True)):
        best = chosen[index]
        text.set_position((places[index][0][best] - points[index]) / pixels)
        if far[best]:
            axes.annotate(
                "", (label.x, label.y), offsets[best], textcoords="offset points", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
            ).set_in_layout(False)  # fmt: skip


def _covered(
    boxes: np.ndarray, leaders: np.ndarray, room: np.ndarray, taken: np.ndarray, own: int, drawn: Sequence[np.ndarray]
) -> np.ndarray:
    """How bad each place is, about the area that it covers; 0: it is free.

    Args:
        boxes, leaders: texts, shape (places, 4), and the lines to them, (places, SAMPLES, 2), nan without one.
        taken: boxes that are to be left visible; `own` is that of the point itself.
        drawn: points along what is drawn.
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    bad = width * height - _shared(boxes, room[None])[:, 0] + _shared(_padded(boxes), taken).sum(axis=1)
    bad += sum(_inside(line[None], boxes).any(axis=1) * height**2 for line in drawn)
    crossed = [_inside(leaders, other[None]).any(axis=1) for index, other in enumerate(taken) if index != own]
    return bad + sum(crossed, np.zeros(len(boxes))) * height**2


def _padded(boxes: np.ndarray) -> np.ndarray:
    """With some room at the sides, so that two texts do not read as one."""
    return boxes + np.array([-PADDING, 0, PADDING, 0])


def _directions() -> tuple[np.ndarray, np.ndarray]:
    """The places that are tried, nearest first: steps from the point, and on which side of their end the text is."""
    found = np.array(list(itertools.product(DISTANCES, np.deg2rad(ANGLES))))
    units = np.stack([np.cos(found[:, 1]), np.sin(found[:, 1])], axis=1)
    return units * found[:, :1], np.sign(units) * (abs(units) > 0.1)


def _along(corners: np.ndarray) -> np.ndarray:
    """Points along a line through the corners, shape (parts * SAMPLES, 2)."""
    steps = np.linspace(0, 1, SAMPLES)[:, None]
    return np.concatenate([start + steps * (end - start) for start, end in itertools.pairwise(corners)] or [corners])


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Which points are inside which box: (places or 1, points, 2) and (places or 1, 4) to (places, points)."""
    return ((points > boxes[:, None, :2]) & (points < boxes[:, None, 2:])).all(axis=-1)


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area that each box has in common with each of the others, shape (boxes, others)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(min=0).prod(axis=-1)
