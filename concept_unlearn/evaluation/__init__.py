"""What a model still knows, still can do, and how well it still writes."""
