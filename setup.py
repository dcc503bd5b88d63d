"""Recipes stand at the top of the repository, and travel inside the package: `trl-quietstar recipes`. All else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes and their pages beside the modules, but for an editable install, which reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree("recipes", f"{self.build_lib}/trl_quietstar/recipes")


setup(cmdclass={"build_py": BuildWithRecipes})
