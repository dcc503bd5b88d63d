"""Which line of the package a device was asked by. It is imported before PyTorch."""

import sys
from pathlib import Path


def innermost_line(*apart: str) -> str:
    """
    The innermost line of the package in the stack, else of whoever else is no part of PyTorch.

    Args:
        apart (`str`):
            Files that are nobody either.
    """
    frame, other = sys._getframe(1), "the backward, in C++"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/trl_quietstar/" in name:
            return f"{Path(name).name}:{frame.f_lineno}"
        if other.startswith("the backward") and name not in apart and "/torch/" not in name and "<" not in name:
            other = f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return other
