"""Rooms of the package import each other in one direction, and no test file imports another."""

from pathlib import Path

import pytest

from .layout import ORDER, against_the_order, importing_tests, modules, room


def test_imports_go_one_way():
    """From a room to those before it in the order."""
    assert against_the_order() == []


def test_each_room_has_a_place():
    """The order names what there is, and nothing else."""
    rooms = {room(path) for path in modules()}
    assert rooms - set(ORDER) == {"__init__", "custom_generate"} and set(ORDER) <= rooms


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        (
            "text/batch.py",
            "from ..model.heads import QuietStarHeads",
            ["text/batch.py imports model, which stands above it"],
        ),
        ("text/batch.py", "from .. import trainer", ["text/batch.py imports trainer, which stands above it"]),
        ("config.py", "def late():\n    from .cli import main", ["config.py imports cli, which stands above it"]),
        ("model/heads.py", "from ..text.batch import Text\nfrom .embeddings import embed_tokens", []),
        ("text/batch.py", "if TYPE_CHECKING:\n    from ..model.heads import QuietStarHeads", []),
    ],
    ids=["a module", "a room", "late", "down and beside", "for types"],
)
def test_an_import_that_goes_up_is_found(tmp_path, module, line, found):
    """In a package of one module."""
    path = tmp_path / module
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert against_the_order(tmp_path) == found


def test_no_test_imports_another(tmp_path):
    """However it is written."""
    assert importing_tests() == []
    written = ["from .test_a import x", "from tests.test_b import x", "from . import test_c", "from .tiny import x"]
    Path(tmp_path, "test_d.py").write_text("\n".join(written))
    assert [line.split()[-1] for line in importing_tests(tmp_path)] == ["test_a", "test_b", "test_c"]
