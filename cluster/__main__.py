"""`python -m cluster` is `tandem`."""

from cluster.cli import main

main()
