"""Where clients come in: HTTP and gRPC, keys and TLS."""
