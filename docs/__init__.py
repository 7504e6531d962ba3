"""The documentation, and the program that writes some of its pages."""
