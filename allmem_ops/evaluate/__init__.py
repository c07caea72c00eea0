"""`python -m allmem_ops.evaluate`: what a converted model remembers, at what speed and in how many bytes."""
