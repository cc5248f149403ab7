"""Dictionaries: SAELens' autoencoders, and whatever else writes an activation as a sum of features."""

from .base import Dictionary as Dictionary
from .load import load_dictionary as load_dictionary
from .load import shipped as shipped
from .sae import SAEDictionary as SAEDictionary
from .sae import as_dictionary as as_dictionary
from .slice import ColumnSlice as ColumnSlice
from .slice import Slice as Slice
from .slice import direction as direction
