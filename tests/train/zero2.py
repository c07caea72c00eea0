"""Run in two processes: train by the command line under DeepSpeed's ZeRO-2, on CPUs."""

import sys

from accelerate import state
from accelerate.utils import DistributedType

from allmem_ops.train.__main__ import finish, run


def main():
    # accelerate passes DeepSpeed over where it is told to use the CPU, and otherwise does not count CPU processes
    plain_init = state.AcceleratorState.__init__

    def init(self, *arguments, **options):
        plain_init(self, *arguments, **options)
        self.distributed_type = DistributedType.DEEPSPEED
        plugin = options.get("deepspeed_plugin")
        if plugin is not None:
            plugin.set_mixed_precision("no")
            plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = {"default": plugin}

    state.AcceleratorState.__init__ = init
    trained = run(sys.argv[1:])
    assert type(trained.module).__name__ == "DeepSpeedEngine" and trained.accelerator.num_processes == 2
    sys.stdout.write("by ZeRO-2\n")
    finish(trained)


if __name__ == "__main__":
    main()
