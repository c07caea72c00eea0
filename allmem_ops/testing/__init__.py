"""Tools to test an operator with; public, so that other code bases can judge their own kernels by the same rule."""

from allmem_ops.testing.budget import assert_within_budget, relative_error
from allmem_ops.testing.poison import poisoned_empty

__all__ = ["assert_within_budget", "poisoned_empty", "relative_error"]
