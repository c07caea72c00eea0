"""Run in two processes: train by the command line, then compare the processes' parameters."""

import gc
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch.nn.parallel import DistributedDataParallel

from allmem_ops.hf import memory_parameters
from allmem_ops.train.__main__ import finish, run


def main():
    trained = run(sys.argv[1:])
    assert PartialState().num_processes == 2
    flat = torch.cat([p.detach().flatten() for p in memory_parameters(trained.model).values()])
    both = gather(flat[None])
    assert both.shape[0] == 2 and torch.equal(both[0], both[1]), "the processes' memories differ"
    sys.stdout.write("equal parameters\n")
    # The reducer of DDP, freed after the process group, would join Gloo's threads under the GIL.
    plain = torch.distributed.destroy_process_group

    def destroy(group=None):
        assert not any(isinstance(x, DistributedDataParallel) for x in gc.get_objects()), "the process group ends before what holds it"
        sys.stdout.write("nothing holds the group\n")
        plain(group)

    assert isinstance(trained.module, DistributedDataParallel)
    torch.distributed.destroy_process_group = destroy
    finish(trained)


if __name__ == "__main__":
    main()
