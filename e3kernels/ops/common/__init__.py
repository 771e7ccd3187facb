"""What the public functions share: checks of arguments, and the operators of the losses."""
