"""The main job: from a config to calibrated patches and a report."""

from .config import Run as Run
from .config import load_run as load_run
from .execution import execute as execute
