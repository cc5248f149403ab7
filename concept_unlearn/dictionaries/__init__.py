"""Dictionaries: SAELens' autoencoders, and whatever else writes an activation as a sum of features."""

from .architecture import Architecture as Architecture
from .base import Dictionary as Dictionary
from .codebook import Codebook as Codebook
from .codebook_training import CodebookArchitecture as CodebookArchitecture
from .evaluate import Quality as Quality
from .evaluate import evaluate_dictionary as evaluate_dictionary
from .load import load_dictionary as load_dictionary
from .load import shipped as shipped
from .sae import SAEDictionary as SAEDictionary
from .sae import as_dictionary as as_dictionary
from .sae_training import BatchtopkArchitecture as BatchtopkArchitecture
from .sae_training import GatedArchitecture as GatedArchitecture
from .sae_training import JumpreluArchitecture as JumpreluArchitecture
from .sae_training import MatryoshkaBatchtopkArchitecture as MatryoshkaBatchtopkArchitecture
from .sae_training import StandardArchitecture as StandardArchitecture
from .sae_training import TopkArchitecture as TopkArchitecture
from .slice import ColumnSlice as ColumnSlice
from .slice import Slice as Slice
from .slice import direction as direction
from .training import Training as Training
from .training import train as train
