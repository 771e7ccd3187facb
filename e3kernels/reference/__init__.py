"""Every operation in plain PyTorch: its definition, the oracle of the tests, and the backend that runs anywhere."""
