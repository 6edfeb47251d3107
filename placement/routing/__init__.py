"""Where a request goes, and whether it is let in."""
