"""The commands, one thin module each. Nothing imports this package."""
