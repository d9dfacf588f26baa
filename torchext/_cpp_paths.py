"""Where C++ programs find torchext: the headers and the CMake package."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.resolve()


def include_path() -> str:
    """Returns the folder to give a C++ compiler with ``-I``.

    Returns:
        The folder in which ``torchext/torchext.h`` stands.
    """
    installed = _PACKAGE / "include"
    # In a source tree (an editable installation) the headers stand outside the package.
    return str(installed if installed.is_dir() else _PACKAGE.parent / "csrc" / "include")


def cmake_prefix_path() -> str:
    """Returns the folder to add to ``CMAKE_PREFIX_PATH``, beside ``torch.utils.cmake_prefix_path``.

    Returns:
        The folder in which ``find_package(TorchExt)`` finds its package.
    """
    return str(_PACKAGE / "share" / "cmake")
