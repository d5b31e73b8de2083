"""The version of this package, and the name of its method."""

# of the method: in PEFT, in recipes, in toolkits
NAME = "kappatune"
__version__ = "0.1.0"
