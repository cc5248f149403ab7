"""Every number that is read off a view. Importing a room registers its metrics."""

from .answers import AnswerLogprob as AnswerLogprob
from .answers import GeneratedAccuracy as GeneratedAccuracy
from .answers import Gibberish as Gibberish
from .answers import RankedAccuracy as RankedAccuracy
from .answers import Touched as Touched
from .texts import Perplexity as Perplexity
