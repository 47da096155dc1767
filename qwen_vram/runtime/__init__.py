"""Load and run what a plan says. The first floor that imports torch."""
