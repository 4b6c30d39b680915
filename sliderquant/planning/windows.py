"""The sliding schedule of windows over the decoder layers: pure functions over layer indices.

    shallow, progressively expanded     {0}, {0,1}, ... {0..Ls-1}
    middle, of a fixed size             sharing size - stride layers with each other and with both neighbours
    deep, progressively contracted      {L-Ld..L-1}, ... {L-2,L-1}, {L-1}

With the published sizes (ramps of 4, middle windows of 2, stride 1) and L = 32 layers:
[0] [0,1] [0..2] [0..3] | [3,4] [4,5] ... [27,28] | [28..31] [29..31] [30,31] [31].

Without ramps this is the schedule of earlier methods: size 1, stride 1 goes block by block (OmniQuant); size 2, stride
1 is CBQ's. Source: SliderQuant (arXiv 2603.25284), section on inter-layer sliding quantization.
"""

from dataclasses import dataclass
from typing import Literal

from sliderquant.errors import InputError

__all__ = ["Window", "schedule"]


@dataclass(frozen=True)
class Window:
    """Layers `start` .. `stop - 1`, refined together."""

    start: int
    stop: int
    phase: Literal["shallow", "middle", "deep"]

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}]" if len(self) == 1 else f"[{self.start}..{self.stop - 1}]"


def schedule(num_layers: int, shallow: int = 4, deep: int = 4, size: int = 2, stride: int = 1) -> tuple[Window, ...]:
    """The windows in the order in which they are refined.

    Every layer is in at least one window, neither end of a window ever moves back, and the last window ends at the last
    layer. A model with too few layers for both ramps gets shorter ones.

    Args:
        num_layers: decoder layers of the model, at least 1.
        shallow, deep: length of the ramps at the two ends; 0: none.
        size: layers in a middle window, at least 1.
        stride: layers by which it slides, 1 .. size.

    Raises:
        InputError: an argument is out of range.
    """
    if num_layers < 1:
        raise InputError(f"windows: a model has at least 1 decoder layer, not {num_layers}")
    if shallow < 0 or deep < 0:
        raise InputError(f"windows.shallow and windows.deep must be 0 or more, not {shallow} and {deep}")
    if size < 1 or not 1 <= stride <= size:
        raise InputError(f"windows: expected size >= 1 and 1 <= stride <= size, got size={size} and stride={stride}")
    shallow, deep = _shrunk(num_layers, shallow, deep)
    ramp_up = [Window(0, stop, "shallow") for stop in range(1, shallow + 1)]
    ramp_down = [Window(start, num_layers, "deep") for start in range(num_layers - deep, num_layers)]
    return (*ramp_up, *_middle(num_layers, shallow, deep, size, stride), *ramp_down)


def _shrunk(num_layers: int, shallow: int, deep: int) -> tuple[int, int]:
    """The ramps, the longer one shortened first (the deep one of two equals) until they do not overlap."""
    shallow, deep = min(shallow, num_layers), min(deep, num_layers)
    while shallow + deep > num_layers:
        if shallow > deep:
            shallow -= 1
        else:
            deep -= 1
    return shallow, deep


def _middle(num_layers: int, shallow: int, deep: int, size: int, stride: int) -> list[Window]:
    shared = size - stride
    begin = max(shallow - shared, 0) if shallow else 0
    end = min(num_layers - deep + shared, num_layers) if deep else num_layers
    nothing_left = shallow + deep == num_layers and not (shared and shallow and deep)
    if nothing_left or begin >= end:
        return []
    starts = list(range(begin, max(end - size, begin) + 1, stride))
    if starts[-1] + size < end:
        starts.append(end - size)
    return [Window(start, min(start + size, end), "middle") for start in starts]
