"""Comparisons of methods and budgets on one recipe: the same data order, matched training loss, several seeds."""
