"""The owner of requests: their journal, their route, their answers."""
