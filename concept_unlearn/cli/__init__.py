"""``concept-unlearn``: each verb is a function of the package, with the same names and defaults.

They are imported in the order in which ``--help`` names them.
"""

# isort: off
from .app import app as app
from .app import main as main
from . import unlearning as unlearning
from . import sequence as sequence
from . import judging as judging
from . import inspecting as inspecting
from . import ui as ui
from . import lm_eval as lm_eval
from . import dictionaries as dictionaries
from . import about as about
from . import doctor as doctor
