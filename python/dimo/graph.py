"""A step recorded once as a CUDA graph: the host then launches one thing instead of thousands of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .phases import unmeasured

WARM_UP_CALLS = 3
"""Calls before the recording, in which libraries and optimisers set up what they keep."""


class Recorded:
    """A function on GPU memory, called as it is a few times, then recorded and replayed.

    It reads what changes between calls from tensors that stay where they are; so does everything it works on, which
    the recording keeps alive through the function.
    """

    def __init__(self, function: Callable[[], dict[str, Tensor]], device: torch.device) -> None:
        self.function, self.device, self.calls = function, device, 0
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self) -> dict[str, Tensor]:
        """Return the function's results; the caller may keep them."""
        self.calls += 1
        with torch.cuda.device(self.device):  # whose streams those below are
            if self.calls <= WARM_UP_CALLS:
                return self._on_a_side_stream()
            if self.calls == WARM_UP_CALLS + 1:
                self._record()
            self.graph.replay()
            return {name: value.clone() for name, value in self.results.items()}

    def _on_a_side_stream(self) -> dict[str, Tensor]:
        """Where the recording will be made: gradients may not be tied to the default stream."""
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            results = self.function()
        main.wait_stream(side)
        return results

    def _record(self) -> None:
        torch.cuda.empty_cache()  # the recording has memory of its own
        with unmeasured(), torch.cuda.graph(self.graph):
            self.results = self.function()
