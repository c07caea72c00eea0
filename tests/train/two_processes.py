"""Run in two processes: train by the command line, then compare the processes' parameters."""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather

from allmem_ops.hf import memory_parameters
from allmem_ops.train.__main__ import finish, run


def main():
    trained = run(sys.argv[1:])
    assert PartialState().num_processes == 2
    flat = torch.cat([p.detach().flatten() for p in memory_parameters(trained.model).values()])
    both = gather(flat[None])
    assert both.shape[0] == 2 and torch.equal(both[0], both[1]), "the processes' memories differ"
    sys.stdout.write("equal parameters\n")
    # From here on a thread of Gloo's holds the tensors of a collective, and waits for the GIL to give them back.
    sys.setswitchinterval(1000.0)
    work = torch.distributed.all_reduce(torch.ones(1000), async_op=True)
    while not work.is_completed():
        pass
    del work
    finish(trained)


if __name__ == "__main__":
    main()
