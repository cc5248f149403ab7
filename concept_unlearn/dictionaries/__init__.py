"""Dictionaries: SAELens' autoencoders, and whatever else writes an activation as a sum of features."""

from .base import Dictionary as Dictionary
from .sae import SAEDictionary as SAEDictionary
from .sae import as_dictionary as as_dictionary
from .slice import ColumnSlice as ColumnSlice
from .slice import Slice as Slice
from .slice import direction as direction
