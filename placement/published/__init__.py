"""The rules of DistServe's and Splitwise's own simulators, to compare with."""
