"""Recipes, and the comparison of their arms at equal compute."""
