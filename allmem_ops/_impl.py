"""The choice of an implementation: `reference`, `chunk`, `triton` or `auto`, never a silent fallback."""

from allmem_ops._validation import check_choice

IMPLS = ("reference", "chunk", "triton", "auto")


def resolve_impl(op: str, impl: str) -> str:
    """The implementation that `impl` names for operator `op`: `"reference"` or `"chunk"`.

    `"auto"` is `"chunk"` on every device as long as the operator has no Triton kernel.

    Raises:
        ValueError: an unknown name, or `"triton"`, for which no kernel exists yet.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "triton":
        raise ValueError(f"`impl`='triton': no Triton kernel exists yet for `{op}`; use 'auto', 'chunk' or 'reference'")
    return "chunk" if impl == "auto" else impl
