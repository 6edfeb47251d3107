"""How many instances of each role, by policy, forecast and budget."""
