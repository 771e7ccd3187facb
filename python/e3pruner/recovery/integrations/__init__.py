"""Distillation inside other trainers; each module needs the trainer's own package."""
