"""What is seen of a cluster: metrics, traces, the live page, logs."""
