"""A training step's forward and backward as CUDA graphs, one for each thing that may change from step to step."""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from allmem_ops._validation import check_shape, fail


class GraphedSteps:
    """`function(*inputs)`, which fills the parameters' `.grad`, captured once for every key and replayed afterwards.

    A step is thousands of small launches; replayed, none of them waits for Python. The graphs work in one memory, since never two of
    them run at a time, and all leave the gradients in the same tensors: leave `.grad` as it is between calls.

    Args:
        function: takes CUDA tensors, runs forward and backward without a host synchronisation, returns a tensor.
        parameters: whose gradients it fills.
        keys: what the function is captured for.
        choose: makes the function do as a key says; called before each capture, with the key.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        keys: Iterable[Hashable],
        choose: Callable[[Hashable], object],
    ) -> None:
        self.function, self.parameters, self.keys, self.choose = function, parameters, list(keys), choose
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, key: Hashable, *inputs: Tensor | None) -> Tensor:
        """The function's result for `inputs`, a tensor that holds it until the next call. The first call captures for all keys.

        Raises:
            ValueError: inputs of another shape than at the first call, or None where there was a tensor.
        """
        if not self.graphs:
            self._capture(inputs)
            self.choose(key)
        for i, (mine, theirs) in enumerate(zip(self.inputs, inputs, strict=True)):
            if (mine is None) != (theirs is None):
                fail(f"inputs[{i}]", "must be None at every call or at none", "a tensor" if mine is None else None)
            if mine is not None:
                names = [f"D{n}" for n in range(mine.dim())]
                check_shape(f"inputs[{i}]", theirs, " ".join(names), dict(zip(names, mine.shape, strict=True)))
                mine.copy_(theirs)
        graph, output = self.graphs[key]
        graph.replay()
        return output

    def _capture(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = [None if x is None else x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for key in self.keys:  # kernels are compiled, handles and lazy modules are made outside the captures
                self._run(key)
        torch.cuda.current_stream().wait_stream(side)
        gradients = [p.grad for p in self.parameters]
        kept = [g for g in gradients if g is not None]
        pool = torch.cuda.graph_pool_handle()
        for key in self.keys:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                output = self._run(key)
                torch._foreach_copy_(kept, [p.grad for p, g in zip(self.parameters, gradients, strict=True) if g is not None])
                for p, g in zip(self.parameters, gradients, strict=True):
                    p.grad = g  # what backward made is free for the next graph
            self.graphs[key] = graph, output

    def _run(self, key: Hashable) -> Tensor:
        self.choose(key)
        for p in self.parameters:
            p.grad = None
        return self.function(*self.inputs)
