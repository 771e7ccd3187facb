"""A decoder by layer and part, and what removing layers would buy."""
