"""Names of a kernel's variants: the kernel's name and the sizes that its launcher chose."""


def variant_name(name: str, **sizes: int | bool) -> str:
    """Returns a variant's name, such as ``rms_norm_rows1_block4096_warps16``."""
    return "_".join([name, *(f"{size}{int(value)}" for size, value in sizes.items())])


LIBRARY_VARIANT = "library"
"""The variant of a call that a kernel of ours passes on to torch's libraries."""
