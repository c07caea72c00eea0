"""`python -m allmem_ops.train`: distil the memory of a Hugging Face causal LM, in one process or, by `accelerate launch`, in several."""
