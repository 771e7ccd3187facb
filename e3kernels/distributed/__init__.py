"""Losses over a vocabulary that the processes of a group hold in parts, as tensor parallelism leaves it."""
