"""Figures about speed and memory, each with the command that makes it again."""
