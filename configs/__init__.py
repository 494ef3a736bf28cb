"""Recipes: values only."""
