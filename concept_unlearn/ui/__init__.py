"""The live page: a model and its patched self side by side, needing nothing from elsewhere once it is installed.

Only ``page`` and ``panel`` know NiceGUI, of the extra ``ui``; they are imported when the page is served.
"""

from .answer import Question as Question
from .answer import Reply as Reply
from .knobs import Knobs as Knobs
from .serve import address_of as address_of
from .serve import check_installed as check_installed
from .serve import listen as listen
from .serve import make_server as make_server
from .serve import serve as serve
from .shelf import Shelf as Shelf
from .stage import Stage as Stage
from .stage import load_patches as load_patches
from .stream import stream as stream
