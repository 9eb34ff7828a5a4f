"""Recipes that make the artefacts the package ships; not installed with it."""
