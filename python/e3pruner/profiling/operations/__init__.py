"""Every operation against the limits of the machine."""
