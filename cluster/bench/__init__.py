"""Load against any OpenAI-compatible server, measured from the outside."""
