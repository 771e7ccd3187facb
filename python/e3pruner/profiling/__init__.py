"""Where the time and the bytes of models and training steps go."""
