"""Serving: many users, one device."""
