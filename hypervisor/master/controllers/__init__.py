"""Loops that bring what is to what was asked for."""
