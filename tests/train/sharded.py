"""Run in two processes: train by the command line with parameters sharded by FSDP2, on CPUs; BREAK_AT ends it before that step."""

import os
import sys

from accelerate import state
from accelerate.utils import DistributedType

from allmem_ops.train.__main__ import finish, run
from allmem_ops.training import Distillation


def main():
    # accelerate offers FSDP on GPUs alone; what it does then works on CPUs too
    plain_init, plain_step = state.AcceleratorState.__init__, Distillation.step

    def init(self, *arguments, **options):
        plain_init(self, *arguments, **options)
        self.distributed_type = DistributedType.FSDP
        if options.get("fsdp_plugin") is not None:
            self.fsdp_plugin = options["fsdp_plugin"]

    def step(self, batch):
        if str(self.index) == os.environ.get("BREAK_AT"):
            sys.exit(3)
        return plain_step(self, batch)

    state.AcceleratorState.__init__, Distillation.step = init, step
    trained = run(sys.argv[1:])
    assert trained.sharded
    sys.stdout.write("sharded\n")
    finish(trained)


if __name__ == "__main__":
    main()
