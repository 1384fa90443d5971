"""Names of a kernel's compiled forms: what it is, and the sizes that its launcher picked."""


def variant_name(name: str, **sizes: int | bool) -> str:
    """Such as ``rms_norm_rows1_block4096_warps16``."""
    return "_".join([name, *(f"{size}{int(value)}" for size, value in sizes.items())])
