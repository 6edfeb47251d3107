"""The search for the plan that serves most, and the words that say why."""
