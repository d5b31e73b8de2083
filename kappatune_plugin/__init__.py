"""KappaTune as a plugin: fine-tune only the weight matrices of lowest condition number (arXiv 2506.16289).

Importing this package registers the method `kappatune` with PEFT.
"""

from kappatune_plugin.condition.kappa import Kappa
from kappatune_plugin.condition.number import condition_number
from kappatune_plugin.errors import KappaTuneError
from kappatune_plugin.interpolation.interpolate import interpolate
from kappatune_plugin.scanning.scan import scan
from kappatune_plugin.selection.report import KappaReport
from kappatune_plugin.selection.selection import Selection, select
from kappatune_plugin.tuner.config import KappaTuneConfig
from kappatune_plugin.tuner.model import KappaTuneModel
from kappatune_plugin.version import __version__

__all__ = [
    "Kappa",
    "KappaReport",
    "KappaTuneConfig",
    "KappaTuneError",
    "KappaTuneModel",
    "Selection",
    "__version__",
    "condition_number",
    "interpolate",
    "scan",
    "select",
]
