"""Loading and running of a model as its plan says.

It is the first floor that imports torch.
"""
