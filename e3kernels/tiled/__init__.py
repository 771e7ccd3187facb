"""The tile loop of the linear losses, which every backend shares."""
