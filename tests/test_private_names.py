"""What other packages keep to themselves is touched in one module."""

import ast
import inspect
import re

import transformers.trainer
from trl.trainer.base_trainer import _BaseTrainer

from trl_quietstar import QuietStarREINFORCETrainer
from trl_quietstar._compat import TRAINER_HOOKS, BaseTrainer

from .layout import PACKAGE, modules


PRIVATE = re.compile("_[a-zA-Z]")
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public, by their documentation
# lm-eval has no other way for a model of one's own than to override private methods of its `HFLM`
OF_HFLM = {"_DEFAULT_MAX_LENGTH", "_create_tokenizer", "_loglikelihood_tokens", "_model_generate"}


def own_names() -> set[str]:
    """Private names that the package itself makes: of functions and classes, of fields, and of attributes of `self`."""
    found = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found


def names_of_the_trainer() -> set[str]:
    """Private methods of the Trainer, and private attributes that it gives itself."""
    tree = ast.parse(inspect.getsource(transformers.trainer))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in attributes | set(dir(_BaseTrainer)) if PRIVATE.match(name)}


def touched(tree: ast.Module) -> list[tuple[int, str, str]]:
    """Line, owner and name of each private name that code imports, reads, sets, passes, or asks for by a string."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.lineno, "import", name) for alias in node.names for name in alias.name.split(".")]
            found += [(node.lineno, "import", name) for name in node.module.split(".")]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, "import", name) for alias in node.names for name in alias.name.split(".")]
        elif isinstance(node, ast.Attribute):
            found.append((node.lineno, ast.unparse(node.value), node.attr))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, "keyword", keyword.arg) for keyword in node.keywords if keyword.arg]
            strings = [x.value for x in node.args if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            if ast.unparse(node.func).split(".")[-1] in ("getattr", "hasattr", "setattr", "delattr", "get"):
                found += [(node.lineno, "string", name) for name in strings]
    return [(line, owner, name) for line, owner, name in found if PRIVATE.match(name) and name not in OF_NAMED_TUPLES]


def test_private_names_of_others_are_touched_in_one_module():
    """But for those of the Trainer that are overridden, and those of lm-eval's model."""
    own, foreign = own_names(), names_of_the_trainer()
    complaints = []
    for path in modules():
        if path.name == "_compat.py":
            continue
        allowed = OF_HFLM if path.name == "harness.py" else set()
        for line, owner, name in touched(ast.parse(path.read_text("utf-8"))):
            is_hook = owner in ("self", "super()") and name in TRAINER_HOOKS
            is_own = owner != "import" and name in own - foreign
            if not (is_hook or is_own or name in allowed):
                complaints.append(f"{path.relative_to(PACKAGE)}:{line} {owner} {name}")
    assert not complaints


def test_private_names_of_the_trainer_that_are_overridden_are_listed():
    """Each is one that the installed Trainer still has, and none is overridden without being listed."""
    ours = [kind for kind in QuietStarREINFORCETrainer.__mro__ if kind.__module__.startswith("trl_quietstar")]
    overridden = {name for kind in ours if kind is not BaseTrainer for name in vars(kind) if PRIVATE.match(name)}
    assert overridden & set(dir(_BaseTrainer)) == set(TRAINER_HOOKS)
