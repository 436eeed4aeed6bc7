"""Stores on disk: the format, creating and filling them, opening, reading and verifying them."""
