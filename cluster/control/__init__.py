"""The controller: keeps the fleet as it was asked to be."""
