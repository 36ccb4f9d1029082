"""layercut: cut, repeat and stack the layers of transformer checkpoints from a recipe.

`load_recipe` reads a recipe, `plan_recipe` decides everything, `run_recipe` writes the result, `analyze` measures and shows.
Nothing here loads torch until something has to be measured.
"""

from layercut.analysis import Analysis
from layercut.api import analyze, plan_recipe, push_model, run_recipe
from layercut.errors import CalibrationError, CheckpointError, LayercutError, OutputError, RecipeError, RefusedError, UploadError
from layercut.plan import Plan
from layercut.recipe import Recipe, load_recipe
from layercut.report import Report, read_report
from layercut.version import __version__

__all__ = [
    "Analysis",
    "CalibrationError",
    "CheckpointError",
    "LayercutError",
    "OutputError",
    "Plan",
    "Recipe",
    "RecipeError",
    "RefusedError",
    "Report",
    "UploadError",
    "__version__",
    "analyze",
    "load_recipe",
    "plan_recipe",
    "push_model",
    "read_report",
    "run_recipe",
]
