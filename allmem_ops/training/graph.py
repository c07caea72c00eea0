"""A training step's forward and backward as one CUDA graph, for fixed shapes and options."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from allmem_ops._validation import check_shape


class GraphedStep:
    """`function(*inputs)`, which fills the parameters' `.grad`, captured at the first call and replayed afterwards.

    The memory's chunk path is thousands of small launches a step; replayed, none of them waits for Python.
    A replay writes every gradient anew into the same memory: leave `.grad` as it is between calls.

    Args:
        function: takes CUDA tensors, runs forward and backward without a host synchronisation, returns a tensor.
        parameters: whose gradients it fills.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: Sequence[Tensor]) -> None:
        self.function, self.parameters = function, parameters
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result for `inputs`; the same tensor at every call.

        Raises:
            ValueError: inputs of another shape than at the first call.
        """
        if self.graph is None:
            self._capture(inputs)
        for i, (mine, theirs) in enumerate(zip(self.inputs, inputs, strict=True)):
            names = [f"D{n}" for n in range(mine.dim())]
            check_shape(f"inputs[{i}]", theirs, " ".join(names), dict(zip(names, mine.shape, strict=True)))
            mine.copy_(theirs)
        self.graph.replay()
        return self.output

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.function(*self.inputs)  # handles, workspaces and lazy modules are made outside the capture
        torch.cuda.current_stream().wait_stream(side)
        for p in self.parameters:
            p.grad = None  # the capture makes gradients of its own, in its own memory
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self.function(*self.inputs)
