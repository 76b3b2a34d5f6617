"""The bundle: what leaves the house, and the torch-free code that runs it."""
