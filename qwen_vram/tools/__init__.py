"""Tools that measure this machine and the accuracy of predictions."""
