"""The version of the data folder's layout, which the file ``layout-version`` in the folder holds."""

from pathlib import Path

from secateur.files import write_whole

VERSION = 1
"""The layout of this version of the service; a folder without the file has layout 1."""
FILE = "layout-version"


class DataFolderError(Exception):
    """This version of the service cannot use the data folder; the message says why and what to do."""


def check(folder: Path) -> None:
    """Check that this version of the service can read the folder; a folder that does not exist passes.

    Raises:
        DataFolderError: the folder has another layout, or the file with the layout's version cannot be read.
    """
    file = folder / FILE
    try:
        found = file.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, UnicodeDecodeError) as error:
        raise DataFolderError(f"The layout of the data folder {folder} is not known: {file}: {error}.") from None
    if not found.isascii() or not found.isdecimal():
        raise DataFolderError(f"The layout of the data folder {folder} is not known: {file} does not hold a number.")
    if int(found) != VERSION:
        age = "a newer" if int(found) > VERSION else "an unknown"
        raise DataFolderError(
            f"The data folder {folder} has layout {found}, which is of {age} version of Secateur; this version reads layout "
            f"{VERSION}. Install the version that wrote the folder, or set SECATEUR_DATA_DIR to another folder."
        )


def claim(folder: Path) -> None:
    """Create the folder if it does not exist, check it, and write the layout's version if the folder has none.

    Raises:
        DataFolderError: see :func:`check`; or the folder cannot be created or written.
    """
    check(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FILE).exists():
            write_whole(folder / FILE, f"{VERSION}\n".encode())
    except OSError as error:
        raise DataFolderError(
            f"The data folder {folder} cannot be written: {error.strerror}. Set SECATEUR_DATA_DIR to another folder."
        ) from None
