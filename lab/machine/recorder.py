"""Training steps on a GPU, recorded as CUDA graphs and played back.

In comes a step: a function of a batch's pixels and labels. Out come the same answers, sooner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.machine.console import say

# From pixels uint8 [B, size, size, 3] and labels int64 [B], what a step gives, each of shape [].
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recording:
    """A training step as a CUDA graph, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    labels: Tensor
    answers: tuple[Tensor, Tensor]


class Recorder:
    """A training step on a GPU, recorded for each shape of batch and from then on played back.

    A step is some 390 kernels, and Python takes seven times as long to ask for them one by one as
    the GPU takes to run them (16 and 2.3 ms on an H200, in bfloat16).
    """

    first_calls = 3  # not recorded, since some things happen once, as the making of momenta

    def __init__(self, step: Step) -> None:
        self.step = step
        self.calls: Counter[torch.Size] = Counter()
        self.recordings: dict[torch.Size, Recording] = {}
        self.can_record = True

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls[pixels.shape] += 1
        if self.calls[pixels.shape] <= self.first_calls or not self.can_record:
            return self.step(pixels, labels)
        if pixels.shape not in self.recordings:
            try:
                self.recordings[pixels.shape] = self.record(pixels.clone(), labels.clone())
            except RuntimeError as error:  # some drivers, some cards of AMD's
                self.can_record = False
                reason = str(error).splitlines()[0]
                say(f"Training goes on in single steps, since none can be recorded: {reason}")
                return self.step(pixels, labels)
        recording = self.recordings[pixels.shape]
        recording.pixels.copy_(pixels)
        recording.labels.copy_(labels)
        recording.graph.replay()
        return recording.answers

    def record(self, pixels: Tensor, labels: Tensor) -> Recording:
        """A step on these tensors, which is not carried out; RuntimeError where that can't be."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answers = self.step(pixels, labels)
        return Recording(graph, pixels, labels, answers)
