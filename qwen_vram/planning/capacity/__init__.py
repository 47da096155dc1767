"""Memory that devices offer, and whether an estimate fits it."""
