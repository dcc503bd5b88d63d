"""Which errors are said in a line, without a traceback: those that the user of a command can mend."""

import re
import traceback
from pathlib import Path


PACKAGE = Path(__file__).parents[1]
# where models and data are fetched, and where an adapter finds no layer of the name it was given
OTHERS = {
    "/huggingface_hub/": OSError,
    "/transformers/utils/hub.py": OSError,
    "/datasets/": OSError,
    "/peft/tuners/tuners_utils.py": ValueError,
}


def words_of(error: Exception) -> str | None:
    """
    What to print of an error in a line; None if it needs its traceback.

    Args:
        error (`Exception`):
            Of this package's own wording, raised in this process or in one of a pool's, or one of [`OTHERS`].
    """
    if not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return None
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if type(error.__cause__).__name__ == "RemoteTraceback":  # whose traceback is text
        raised_in = re.findall(r'^  File "(.*?)", line', str(error.__cause__), re.MULTILINE)[-1]
    is_own = Path(raised_in).is_relative_to(PACKAGE)
    place = Path(raised_in).as_posix()
    is_clear = is_own or any(part in place and isinstance(error, kind) for part, kind in OTHERS.items())
    return " ".join(str(error).split()) if is_clear else None
