"""The command line that reads a file of any length in constant memory and answers: `python -m allmem_ops.generate`."""
