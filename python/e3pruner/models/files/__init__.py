"""Checkpoint folders by their files: the headers, whose tensors are whose, and models that read a layer at a time."""
