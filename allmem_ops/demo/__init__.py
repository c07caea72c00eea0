"""`python -m allmem_ops.demo`: a real pretrained LLM becomes an AllMem model, on a machine without a GPU."""
