"""`trl-quietstar recipes`: the recipes that come with the package.

    trl-quietstar recipes
    trl-quietstar recipes copy lora my_recipe.yaml

They stand at the top of the repository; a wheel holds them inside the package (`setup.py`).
"""

import shutil
from difflib import get_close_matches
from pathlib import Path


INSTALLED, IN_REPOSITORY = (Path(__file__).parents[up] / "recipes" for up in (1, 2))


def folder() -> Path:
    """Where the recipes are."""
    return INSTALLED if INSTALLED.is_dir() else IN_REPOSITORY


def recipes() -> dict[str, Path]:
    """The file of each recipe by its name: those of training first, then `accelerate/...`, which say on how many devices."""
    files = sorted(folder().rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(folder()).with_suffix("").as_posix(): file for file in files}


def advice(name: str) -> str:
    """Where to find a recipe that is not where it was looked for."""
    if name in recipes():
        return f"`trl-quietstar recipes copy {name}` copies the one of that name here."
    return "`trl-quietstar recipes` lists those that come with the package."


def run(argv: list[str]) -> None:
    """Lists the recipes, or copies one: `copy NAME [DEST]`."""
    if not argv:
        width = max(map(len, recipes())) + 2
        print(*(f"{name.ljust(width)}{summary(file)}" for name, file in recipes().items()), sep="\n")
        print("\n`trl-quietstar recipes copy NAME` copies one into this folder, to change it and train by it.")
    elif argv[0] == "copy" and len(argv) in (2, 3) and not argv[1].startswith("-"):
        copy(*argv[1:])
    else:
        raise ValueError(f"`recipes {' '.join(argv)}` is not known; give `recipes`, or `recipes copy NAME [DEST]`.")


def summary(file: Path) -> str:
    """What a recipe is, by the comment that it begins with."""
    with file.open(encoding="utf-8") as lines:
        return next(lines).lstrip("# ").split(";")[0].strip().removesuffix(".")


def copy(name: str, destination: str = ".") -> None:
    """
    Copies a recipe, and says how to train by it.

    Args:
        name (`str`):
            Of the recipe, with or without `.yaml`.
        destination (`str`):
            A folder to copy it into, or a file to write.

    Raises:
        `FileExistsError`: if there is such a file already.
        `ValueError`: if there is no such recipe.
    """
    name, found = name.removesuffix(".yaml"), recipes()
    if name not in found:
        near = get_close_matches(name, found, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(found)}."
        raise ValueError(f"There is no recipe {name!r}; {meant}")
    target = Path(destination)
    target = target / found[name].name if target.is_dir() else target
    if target.exists():
        raise FileExistsError(f"{str(target)!r} is there already; give another file: `recipes copy {name} FILE`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found[name], target)
    page = found[name].with_suffix(".md")
    if page.is_file():
        print(f"{page} says where its values are from.")
    is_engine = "/" in name
    start = f"accelerate launch --config_file {target} -m trl_quietstar.cli" if is_engine else "trl-quietstar"
    print(f"Copied to {target}. Train by it: `{start} train --config {'RECIPE.yaml' if is_engine else target}`.")
