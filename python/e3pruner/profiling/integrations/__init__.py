"""The profile of some steps, as callbacks of other trainers; each module needs the trainer's own package."""
