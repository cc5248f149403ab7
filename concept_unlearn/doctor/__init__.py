"""What is missing or broken here, and how to mend it."""

from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import diagnose as diagnose
from .finding import Finding as Finding
