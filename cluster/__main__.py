"""`python -m cluster` is `tandem`."""

from cluster.cli.app import main

main()
