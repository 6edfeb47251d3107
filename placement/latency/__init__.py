"""How long a pass takes: from a catalog by roofline, or from what was measured."""
