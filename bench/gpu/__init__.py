"""Measurements on a real GPU: `make gpu`, or `python -m bench.gpu`; without a network `make gpu-offline`."""
