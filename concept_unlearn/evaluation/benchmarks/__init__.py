"""What models are asked. Importing a room registers its benchmarks."""

from .concept import ConceptBenchmark as ConceptBenchmark
